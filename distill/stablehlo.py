"""The forward pass as a StableHLO program that runs without this code, for one batch size, on CPU, GPU or TPU.

FILE holds the program, as `jax.export.deserialize` reads it; the parameters, which are its first argument, lie beside
it in FILE.safetensors, by our names:

    program = jax.export.deserialize(bytearray(open(FILE, "rb").read()))
    outputs = program.call(safetensors.numpy.load_file(FILE + ".safetensors"), images)  # or distill.tensors
"""

import dataclasses
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from distill.tensors import write_safetensors
from vit22b.config import ModelConfig, RecipeError
from vit22b.model import ViT
from vit22b.names import named_leaves
from vit22b.sharding import BATCH, concrete, make_mesh

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: ViT, path: Path, batch_size: int = 1) -> None:
    """Writes the program and its parameters, fp32. The batch size is fixed: JAX cannot refine an open one on a mesh.

    The program maps fp32 parameters by name and images (B, S, S, 3), fp32 and normalised, to 'logits' (B, C) and
    'pooled' (B, D), fp32, and 'tokens' (B, T, D). Raises `RecipeError` where a file is there already.
    """
    weights = path.with_name(path.name + ".safetensors")
    for file in (path, weights):
        if file.exists():
            raise RecipeError(f"{file}: is there already; nothing is overwritten")
    try:
        import flatbuffers  # noqa: F401  JAX writes programs with it
    except ImportError as error:
        raise RecipeError("stablehlo: needs flatbuffers; pip install flatbuffers") from error
    parameters = named_leaves(model)
    exported = program(model.config, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exported.serialize())
    shapes = {name: leaf.shape for name, leaf in parameters.items()}
    write_safetensors(weights, shapes, lambda name: np.asarray(parameters[name], np.float32), {"format": "np"})


def program(config: ModelConfig, batch_size: int) -> jax.export.Exported:
    """The forward pass, lowered for all of `PLATFORMS`: parameters by name and images to outputs by name."""
    config = dataclasses.replace(config, attention="xla", kernels="xla", overlap=False, remat="none")
    # A mesh of one device: the program is for one, wherever it runs.
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = concrete(jax.eval_shape(lambda: ViT(config, jax.random.key(0))), mesh)
        names, structure = named_leaves(model), jax.tree.structure(model)

        def forward(parameters: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
            output = jax.tree.unflatten(structure, [parameters[name] for name in names])(images)
            return {"logits": output.logits, "pooled": output.pooled, "tokens": output.tokens}

        shape = (batch_size, config.image_size, config.image_size, 3)
        images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, BATCH))
        return jax.export.export(jax.jit(forward), platforms=PLATFORMS)(names, images)
