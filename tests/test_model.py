"""The model against an independent NumPy one, and against itself on other meshes and computed in other ways."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import MeshFactory
from flax import nnx
from jax.sharding import NamedSharding, use_abstract_mesh

from vit22b.config import LADDER, SIZES, ModelConfig, size
from vit22b.model import REMAT, Block, Output, ViT
from vit22b.sharding import BATCH, RESIDUAL, abstract_mesh, concrete

TINY = ModelConfig(
    width=32, depth=3, mlp_dim=64, num_heads=4, num_classes=10, image_size=12, patch_size=4, matmul="fp32"
)
DEIT = {"block": "sequential", "norm": "layer", "norm_bias": True, "qk_norm": "none", "qkv_bias": True, "proj_bias": True}
# Together they take every choice there is: see test_the_configurations_take_every_choice.
CONFIGS = {
    name: dataclasses.replace(TINY, **changes)
    for name, changes in {
        "vit22b": {},
        "internvit": {"block": "sequential", "qk_norm": "width", "layer_scale": 0.1, "class_token": True, "pool": "cls"},
        "deit3": DEIT | {"mlp": "gelu", "layer_scale": 0.1, "class_token": True, "num_registers": 2, "pool": "cls"},
        "dinov3": DEIT | {"mlp": "swiglu", "position": "rope", "class_token": True, "num_registers": 3, "pool": "gap"},
        "siglip": DEIT | {"position": "sincos", "num_registers": 1},
        "vit5": {"mlp": "swiglu", "mlp_bias": False, "position": "rope", "rope_base": 50.0, "layer_scale": 0.2},
        "mimetic": {"mlp": "gelu", "position": "sincos", "qkv_bias": True, "norm_bias": True, "pool": "gap"},
        "bag": {"norm": "layer", "norm_epsilon": 0.1, "qk_norm": "width", "proj_bias": True, "position": "none"},
    }.items()
}
PARALLEL, SEQUENTIAL = CONFIGS["vit22b"], CONFIGS["internvit"]
LAYERS = (2, 0)  # of three, and not in order


@pytest.fixture(autouse=True)
def _strict_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


class Run(NamedTuple):
    output: Output
    gradients: dict[str, np.ndarray]
    temporary_bytes: int


def named(tree) -> dict:
    """Leaves by the path of their attributes, such as 'blocks/attention/query'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="/"): leaf for path, leaf in leaves}


def abstract_model(config: ModelConfig) -> ViT:
    return jax.eval_shape(lambda: ViT(config, jax.random.key(0)))


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """A value for every parameter, none of them special: scales around one, biases not zero, matrices that keep size."""
    with use_abstract_mesh(abstract_mesh((1, 1, 1))):
        shapes = {name: leaf.shape for name, leaf in named(abstract_model(config)).items()}
    rng, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        is_vector = name.endswith(("bias", "scale"))
        weights[name] = rng.normal(size=shape).astype(np.float32) * (0.3 if is_vector else shape[-2] ** -0.5)
        if name.endswith("scale"):
            weights[name] += 1
    return weights


def random_model(config: ModelConfig, mesh: jax.sharding.Mesh) -> ViT:
    """A model on `mesh` with the values of `random_weights`."""
    leaves, treedef = jax.tree.flatten(concrete(abstract_model(config), mesh))
    values = random_weights(config).values()
    return treedef.unflatten([jax.device_put(v, leaf.sharding) for v, leaf in zip(values, leaves, strict=True)])


def random_images(config: ModelConfig, batch: int = 8) -> np.ndarray:
    """Of the native size for a table of positions; otherwise oblong, which tells rows from columns."""
    sides = (config.image_size,) * 2 if config.position == "learned" else (8, 16)
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


COTANGENT = np.random.default_rng(2).normal(size=(8, TINY.num_classes)).astype(np.float32)


@functools.cache
def run(mesh: MeshFactory, config: ModelConfig, shape: tuple[int, int, int] = (1, 1, 1)) -> Run:
    """Outputs, and gradients of sum(logits * COTANGENT), of the random model on a mesh of that shape."""

    def loss(model: ViT, images: jax.Array) -> tuple[jax.Array, Output]:
        output = model(images, layers=LAYERS)
        return jnp.sum(output.logits * COTANGENT), output

    with mesh(*shape) as m:
        arguments = random_model(config, m), jax.device_put(random_images(config), NamedSharding(m, BATCH))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile()
        (_, output), gradients = jax.tree.map(np.asarray, step(*arguments))
    return Run(output, named(gradients), step.memory_analysis().temp_size_in_bytes)


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """1e-5 of the largest value, which here lies between 1 and 100 (where less, as for gradients that vanish: of 1)."""
    atol = 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def assert_same_run(actual: Run, expected: Run) -> None:
    for name, value in expected.output._asdict().items():
        assert_close(getattr(actual.output, name), value, name)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, name)


def test_the_configurations_take_every_choice() -> None:
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    architecture = fields[fields.index("block") : fields.index("stochastic_depth")]
    taken = {name: {getattr(config, name) for config in CONFIGS.values()} for name in architecture}
    for name, choices in {
        "block": ("parallel", "sequential"),
        "norm": ("rms", "layer"),
        "qk_norm": ("none", "head", "width"),
        "mlp": ("gelu", "gelu_tanh", "swiglu"),
        "position": ("learned", "sincos", "rope", "none"),
        "pool": ("map", "gap", "cls"),
    }.items():
        assert taken.pop(name) == set(choices)
    for name, values in taken.items():  # switches and numbers: off and on, or the default and another
        assert len(values) >= 2, name
    for config in CONFIGS.values():
        config.validate()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_reference(name: str, mesh: MeshFactory) -> None:
    config = CONFIGS[name]
    output = run(mesh, config).output
    expected = reference.forward(config, random_weights(config), random_images(config))
    assert_close(output.logits, expected.logits, "logits")
    assert_close(output.pooled, expected.pooled, "pooled")
    assert_close(output.tokens, expected.tokens, "tokens")
    assert_close(output.layers, expected.layers[list(LAYERS)], "layers")


def softmax_ignores(config: ModelConfig, name: str) -> bool:
    """A vector added to all keys adds q.b to all scores of a query q. It does matter if a norm or a rotation follows."""
    pooling = name.startswith("map_head")
    turned = config.position == "rope" and not pooling
    normed = config.qk_norm != "none" and not pooling
    return not turned and (name.endswith("key_norm/bias") or (name.endswith("key_bias") and not normed))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_the_references_finite_differences_and_reach_every_row(name: str, mesh: MeshFactory) -> None:
    config = CONFIGS[name]
    gradients, weights, images = run(mesh, config).gradients, random_weights(config), random_images(config)

    def loss(parameter: str, step: np.ndarray) -> float:
        moved = weights | {parameter: weights[parameter] + step}
        return float(np.sum(reference.forward(config, moved, images).logits * COTANGENT))

    assert gradients.keys() == weights.keys()
    for parameter, gradient in gradients.items():
        direction = np.random.default_rng(3).normal(size=gradient.shape)
        slope = (loss(parameter, 1e-6 * direction) - loss(parameter, -1e-6 * direction)) / 2e-6
        norm = np.linalg.norm(gradient.astype(np.float64))
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=0, atol=1e-5 * max(1, norm), err_msg=parameter)
        if softmax_ignores(config, parameter):
            assert norm < 1e-4, parameter
        else:
            assert np.abs(gradient.reshape(len(gradient), -1)).max(axis=1).min() > 1e-4, parameter


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("config", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
def test_eight_devices_equal_one(config: ModelConfig, shape: tuple[int, int, int], mesh: MeshFactory) -> None:
    assert_same_run(run(mesh, config, shape), run(mesh, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_unroll": 2},
        {"scan_unroll": 3},
        {"fused": False},
        *({"remat": name} for name in REMAT if name != "none"),
        {"remat": "full", "scan_unroll": 3},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_value_and_no_gradient(changes: dict, mesh: MeshFactory) -> None:
    shape = (2, 2, 2)
    assert_same_run(run(mesh, dataclasses.replace(PARALLEL, **changes), shape), run(mesh, PARALLEL, shape))


def test_x(mesh) -> None:
    for c in (PARALLEL, SEQUENTIAL):
        for s in ((1,1,1), (2,2,2)):
            for n in REMAT:
                for u in (1, 3):
                    print(n, s, u, run(mesh, dataclasses.replace(c, remat=n,scan_unroll=u), s).temporary_bytes)
