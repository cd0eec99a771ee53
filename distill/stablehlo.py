"""The forward pass as a StableHLO program that runs without this code, for any batch size, on CPU, GPU or TPU.

FILE holds the program, as `jax.export.deserialize` reads it; the parameters, which are its first argument, lie beside
it in FILE.safetensors, by our names:

    program = jax.export.deserialize(bytearray(open(FILE, "rb").read()))
    outputs = program.call(safetensors.numpy.load_file(FILE + ".safetensors"), images)  # or distill.tensors
"""

import concurrent.futures
import dataclasses
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard, use_abstract_mesh

from distill.tensors import write_safetensors
from vit22b.errors import RecipeError
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.sharding import BATCH, abstract_mesh, spec_of

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: ViT, path: Path) -> None:
    """Writes the program and its parameters, fp32.

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
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # in which no mesh is in force, as one may be here
        exported = thread.submit(program, model.config).result()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exported.serialize())
    shapes = {name: leaf.shape for name, leaf in parameters.items()}
    write_safetensors(weights, shapes, lambda name: np.asarray(parameters[name], np.float32), {"format": "np"})


def program(config: ModelConfig) -> jax.export.Exported:
    """The forward pass, lowered for all of `PLATFORMS`: parameters by name and images to outputs by name.

    To be called with no mesh in force.
    """
    config = dataclasses.replace(config, attention="xla", kernels="xla", overlap="none", remat="none")
    # A mesh of one device: the program is for one, wherever it runs. It is entered inside, since JAX cannot fill in an
    # open batch size of arguments that lie on a mesh.
    mesh = abstract_mesh((1, 1, 1))
    with use_abstract_mesh(mesh):
        model = abstract_model(config)
    names, structure = named_leaves(model), jax.tree.structure(model)

    def forward(parameters: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        with use_abstract_mesh(mesh):
            leaves = [reshard(parameters[name], spec_of(leaf)) for name, leaf in names.items()]
            output = jax.tree.unflatten(structure, leaves)(reshard(images, BATCH))
        return {"logits": output.logits, "pooled": output.pooled, "tokens": output.tokens}

    (batch,) = jax.export.symbolic_shape("batch")
    parameters = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in names.items()}
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), jnp.float32)
    return jax.export.export(jax.jit(forward), platforms=PLATFORMS)(parameters, images)
