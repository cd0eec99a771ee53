"""Names of arrays: their path of attributes, 'blocks/attention/query'. Decay, checkpoints and reports go by them."""

import jax


def path_name(path: tuple) -> str:
    """A leaf's name from its key path; Flax's inner attribute 'value' of every parameter is no part of it."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree) -> dict[str, jax.Array]:
    """The leaves of any pytree by name, in its own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
