"""The mesh, and what may lie on it.

Every array lives on one mesh with the axes `('replica', 'data', 'model')`; an unused axis has size 1.
The batch is split over `replica` and `data`; parameters and optimizer state over `data` (FSDP) and
`model` (tensor parallelism); the residual stream over all three, by images or, with rings, in its width
over `model`, as in ViT-22B [Dehghani 2023, section 3.2]. All axes are Explicit: shardings are part of array types,
so a forgotten one is an error at trace time instead of a silent copy.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit22b.config import MeshConfig, Recipe
from vit22b.errors import RecipeError, check

AXES = ("replica", "data", "model")
BATCH = P(("replica", "data"))
RESIDUAL = P(("replica", "data"), None, "model")  # B T D
BY_IMAGE = P(("replica", "data", "model"))  # B T D: the other way; linear.residual chooses
HIDDEN = P(("replica", "data"), None, "model")  # B T F, and B T (N H)
TRANSPOSED = P("model", ("replica", "data"), None)  # the same with the last dimension first
SPLIT = P("model")  # F: a vector along the hidden dimension
COLUMN, ROW = P(None, "model"), P("model", None)  # kernels, gathered over 'data' for use
HEADS = P(("replica", "data"), None, "model", None)  # B T N H


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Devices per axis, with -1 resolved. Raises `RecipeError` unless the axes use every device."""
    shape = [config.replica, config.data, config.model]
    text = f"replica={shape[0]},data={shape[1]},model={shape[2]}"
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise RecipeError(f"mesh={text}: each axis must be at least 1, and at most one may be -1 (all that remain)")
    known = int(np.prod([n for n in shape if n != -1]))
    check(
        num_devices % known == 0 and (-1 in shape or known == num_devices),
        "mesh",
        text,
        f"does not fill {num_devices} device(s); the product must be {num_devices}, "
        "for example with --config.mesh.replica=1 --config.mesh.data=-1 --config.mesh.model=1",
    )
    replica, data, model = (num_devices // known if n == -1 else n for n in shape)
    return replica, data, model


def check_divisibility(recipe: Recipe, shape: tuple[int, int, int]) -> None:
    """Raises `RecipeError` where the mesh does not divide the batch or the model."""
    replica, data, model = shape
    batch, shards = recipe.batch_size, replica * data * recipe.optim.accumulate_steps
    what = f"mesh.replica={replica} x mesh.data={data} x optim.accumulate_steps={recipe.optim.accumulate_steps}"
    if recipe.model.overlap == "halves" and model > 1:
        shards, what = shards * 2 * model, what + f" x mesh.model={model} x 2 (model.overlap='halves')"
    elif recipe.data.mixup or recipe.data.cutmix:  # mixed in neighbouring pairs, which must share a device
        shards, what = shards * 2, what + " x 2 (mixup and cutmix pair neighbours)"
    check(
        batch % shards == 0,
        "batch_size",
        batch,
        f"must be a multiple of {shards} = {what}; try {max(batch // shards, 1) * shards}",
    )
    recipe.check_mesh(data, model)


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of real devices, all axes Explicit.

    On a TPU slice the axes lie along the dimensions of its torus, or parts of them, and neighbours on `model` are
    neighbours there, the last and the first included: what rings need (vit22b/ring.py).
    """
    devices = jax.devices() if devices is None else devices
    placed = fold_onto_torus(shape, devices)
    if placed is None:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def fold_onto_torus(shape: tuple[int, int, int], devices: list[jax.Device]) -> np.ndarray | None:
    """The devices, by mesh axis, with each row of `model` walking around a rectangle of chips, two wide.

    None where that does not apply: not one device per chip of a torus, or `model` fills a dimension that is a ring as
    it is.
    """
    if shape[2] < 4 or shape[2] % 2 or not hasattr(devices[0], "coords"):
        return None
    dims = np.max([d.coords for d in devices], axis=0) + 1
    rings = [size for size, closed in zip(dims, closed_dimensions(dims), strict=True) if closed]
    if np.prod(dims) != len(devices) or shape[2] in rings:
        return None
    chips = np.empty(dims, object)
    for device in devices:
        chips[tuple(device.coords)] = device
    half = shape[2] // 2
    for long, wide in itertools.permutations(range(3), 2):
        rest = 3 - long - wide
        # `data` varies fastest after `model`: let it have the third dimension, where it can.
        if dims[long] % half or dims[wide] % 2 or shape[1] % dims[rest]:
            continue
        blocks = chips.transpose(wide, long, rest).reshape(dims[wide] // 2, 2, dims[long] // half, half, dims[rest])
        there, back = blocks[:, 0], blocks[:, 1, :, ::-1]
        walks = np.concatenate([there, back], axis=2)  # wide / 2, long / half, model, rest
        return walks.transpose(0, 1, 3, 2).reshape(shape)
    return None


def closed_dimensions(dims: np.ndarray) -> list[bool]:
    """Which dimensions of a TPU slice close to rings: all in full cubes of 4 x 4 x 4 chips; in a plane, those of 16."""
    if dims[2] == 1:
        return [size == 16 for size in dims]
    return [all(size % 4 == 0 for size in dims)] * 3


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    """A mesh of no devices at all, on which any recipe can be traced at full size."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3)


def concrete(tree, mesh: Mesh):
    """The shapes and specs of an abstract tree as `ShapeDtypeStruct`s that are placed on `mesh`."""

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(leaf)))

    return jax.tree.map(place, tree)


def on_batch(function: Callable) -> Callable:
    """The function of arrays that are split as `BATCH`, each device applying it to its part; so are the results."""
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def spec_of(leaf) -> P:
    """The partition of an array or abstract array; replicated where none is set."""
    return leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of (abstract) sharded arrays."""

    def leaf_bytes(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf.sharding, NamedSharding) else leaf.shape
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))
