"""The mesh, what lies where on it, and what one block communicates."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, named
from jax.sharding import NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from vit22b.config import DataConfig, MeshConfig, OptimConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.linear import residual
from vit22b.model import Block, ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.sharding import (
    abstract_mesh,
    bytes_per_device,
    check_divisibility,
    concrete,
    mesh_shape,
    spec_of,
)

# Sizes that tell the kernels apart by shape.
MODEL = ModelConfig(
    width=32, depth=2, mlp_dim=128, num_heads=4, num_classes=16, image_size=8, patch_size=4, matmul="fp32",
    class_token=True,
)  # fmt: skip


def recipe(batch_size: int = 64, accumulate_steps: int = 1, mixup: float = 0.0, **model) -> Recipe:
    return Recipe(
        name="test",
        total_steps=10,
        batch_size=batch_size,
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(train="digits", validation="digits", mixup=mixup),
        optim=OptimConfig(accumulate_steps=accumulate_steps),
    )


@pytest.mark.parametrize(
    ("axes", "num_devices", "shape"),
    [
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((-1, 4, 2), 8, (1, 4, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((1, 1, -1), 1, (1, 1, 1)),
    ],
)
def test_minus_one_is_all_devices_that_remain(axes: tuple, num_devices: int, shape: tuple) -> None:
    replica, data, model = axes
    assert mesh_shape(MeshConfig(replica=replica, data=data, model=model), num_devices) == shape


@pytest.mark.parametrize("axes", [(1, -1, -1), (0, -1, 1), (1, 1, -2)])
def test_an_impossible_axis_is_refused(axes: tuple) -> None:
    replica, data, model = axes
    text = f"mesh=replica={replica},data={data},model={model}: each axis must be at least 1, and at most one may be -1"
    with pytest.raises(RecipeError, match=re.escape(text)):
        mesh_shape(MeshConfig(replica=replica, data=data, model=model), 8)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 4), (3, -1, 1), (1, 16, -1)])
def test_a_mesh_that_does_not_fill_the_devices_is_refused_with_one_that_does(axes: tuple) -> None:
    replica, data, model = axes
    with pytest.raises(RecipeError, match=r"does not fill 8 device\(s\); the product must be 8") as error:
        mesh_shape(MeshConfig(replica=replica, data=data, model=model), 8)
    flags = re.findall(r"--config\.mesh\.(\w+)=(-?\d+)", str(error.value))
    assert mesh_shape(MeshConfig(**{axis: int(value) for axis, value in flags}), 8) == (1, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "shape", "shards"),
    [
        ({"batch_size": 100}, (2, 4, 1), 8),
        ({"batch_size": 3}, (2, 2, 2), 4),
        ({"batch_size": 90, "accumulate_steps": 5}, (2, 2, 2), 20),
        ({"batch_size": 24, "accumulate_steps": 2}, (1, 8, 1), 16),
        ({"batch_size": 24, "mixup": 0.2}, (1, 8, 1), 16),
    ],
)
def test_the_batch_size_suggested_works(arguments: dict, shape: tuple, shards: int) -> None:
    with pytest.raises(RecipeError, match=rf"batch_size={arguments['batch_size']}: .* multiple of {shards}") as error:
        check_divisibility(recipe(**arguments), shape)
    suggested = int(re.search(r"try (\d+)", str(error.value))[1])
    check_divisibility(recipe(**arguments | {"batch_size": suggested}), shape)


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        ({"num_heads": 2}, (1, 2, 4), "mesh.model=4: must divide model.num_heads=2"),
        ({"mlp_dim": 36}, (1, 1, 8), "mesh.model=8: must divide model.num_heads=4"),
        ({"mlp_dim": 34}, (1, 2, 4), "mesh.model=4: must divide model.mlp_dim=34"),
        ({"width": 36}, (1, 8, 1), "mesh.data=8: must divide model.width=36"),
        ({"width": 36}, (1, 1, 8), "mesh.model=8: must divide model.width=36"),
        # Three divides the heads, and not the devices.
        ({"width": 96, "num_heads": 6}, (1, 2, 4), "mesh.model=4: must divide model.num_heads=6"),
        # Eight divides the MLP, and not the heads.
        ({"width": 96, "num_heads": 12, "mlp_dim": 128}, (1, 1, 12), "mesh.model=12: must divide model.mlp_dim=128"),
    ],
)
def test_the_mesh_axis_suggested_works(sizes: dict, shape: tuple, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        check_divisibility(recipe(batch_size=48, **sizes), shape)
    axis, suggested = re.match(r"mesh\.(\w+)=", message)[1], int(re.search(r"that does: (\d+)", str(error.value))[1])
    others = {"data": -1} if axis == "model" else {"replica": -1}
    smaller = mesh_shape(MeshConfig(**{"data": 1} | others | {axis: suggested}), int(np.prod(shape)))
    check_divisibility(recipe(batch_size=48, **sizes), smaller)


@pytest.fixture(scope="module")
def placed(mesh: MeshFactory) -> ViT:
    """A model created on a mesh with all three axes."""
    with mesh(2, 2, 2):
        return jax.jit(lambda key: ViT(MODEL, key))(jax.random.key(0))


def test_every_matrix_of_the_body_is_split_over_data_and_model(placed: ViT) -> None:
    for name, leaf in named(placed).items():
        shards = {shard.data.shape for shard in leaf.addressable_shards}
        rows, columns = leaf.shape[-2:] if leaf.ndim > 1 else (None, None)
        if name.startswith(("blocks", "map_head")) and name.endswith(("query", "key", "value", "up", "out")):
            # What leads back is split over both axes by rows, so that gradients need not be transposed.
            parts = (4, 1) if name.endswith("out") else (2, 2)
            expected = (*leaf.shape[:-2], rows // parts[0], columns // parts[1])
            assert len({str(shard.index) for shard in leaf.addressable_shards}) == 4  # and replicated twice
        elif name in ("patch_kernel", "position"):
            expected = (rows, columns // 2)
        elif name == "head_kernel":
            expected = (rows // 2, columns)
        else:  # vectors and tokens
            expected = leaf.shape
        assert shards == {expected}, name


@pytest.mark.parametrize("changes", [{"mlp_dim": 132}, {"overlap": "rings"}])
def test_rows_that_cannot_be_divided_and_rings_have_columns_split_over_data(changes: dict, mesh: MeshFactory) -> None:
    """132 rows over 2 x 4 devices."""
    with mesh(1, 4, 2):
        out = named(abstract_model(dataclasses.replace(MODEL, **changes)))["blocks/mlp/out"]
    depth, rows, columns = out.shape
    assert out.sharding.shard_shape(out.shape) == (depth, rows // 2, columns // 4)


def test_an_abstract_mesh_gives_the_shapes_dtypes_and_specs_of_the_real_one(placed: ViT, mesh: MeshFactory) -> None:
    with use_abstract_mesh(abstract_mesh((2, 2, 2))):
        abstract = abstract_model(MODEL)
    real = named(placed)
    with mesh(2, 2, 2) as m:
        on_mesh = named(concrete(abstract, m))
    assert named(abstract).keys() == real.keys()
    for name, leaf in named(abstract).items():
        assert (leaf.shape, leaf.dtype) == (real[name].shape, real[name].dtype)
        for other in (leaf, on_mesh[name]):
            full = P(*spec_of(other), *[None] * (leaf.ndim - len(spec_of(other))))
            assert real[name].sharding.is_equivalent_to(NamedSharding(m, full), leaf.ndim), name


def test_bytes_per_device_are_what_the_first_device_holds(placed: ViT) -> None:
    device = jax.devices()[0]
    held = [s.data.nbytes for leaf in jax.tree.leaves(placed) for s in leaf.addressable_shards if s.device == device]
    assert bytes_per_device(placed) == sum(held)
    with use_abstract_mesh(abstract_mesh((2, 2, 2))):
        assert bytes_per_device(abstract_model(MODEL)) == sum(held)
    assert bytes_per_device({"x": jnp.zeros((3, 5), jnp.bfloat16), "y": jnp.zeros(2)}) == 30 + 8


def collectives(
    config: ModelConfig, shape: tuple[int, int, int], mesh: MeshFactory, backward: bool = False, batch: int = 8
) -> dict:
    """Each collective of one block's compiled pass, with its results' shapes on a device, and how often it is there."""

    def forward(block: Block, x_BTD: jax.Array) -> jax.Array:
        return block(x_BTD, None, None)

    def both(block: Block, x_BTD: jax.Array) -> tuple:
        y_BTD, pull_back = jax.vjp(forward, block, x_BTD)
        return pull_back(y_BTD)

    with mesh(*shape) as m:
        block = concrete(jax.eval_shape(lambda: Block(config, jax.random.key(0))), m)
        spec = residual(batch, config)
        x_BTD = jax.ShapeDtypeStruct((batch, 9, config.width), jnp.float32, sharding=NamedSharding(m, spec))
        text = jax.jit(both if backward else forward).lower(block, x_BTD).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return collections.Counter(" ".join([kind, *sorted(re.findall(r"\[[\d,]*\]", result))]) for result, kind in found)


# What XLA makes of a block on CPUs, where a reduce-scatter is an all-reduce and a slice. A line more is a
# line to explain: usually an array whose sharding was not stated.


def test_fsdp_gathers_each_kernel_once_and_reduces_each_gradient_once(mesh: MeshFactory) -> None:
    gathers = {
        "all-gather [32,32]": 4,  # query, key, value, attention out
        "all-gather [32,128]": 1,  # MLP up
        "all-gather [128,32]": 1,  # MLP out
    }
    assert collectives(MODEL, (1, 8, 1), mesh) == gathers
    # All gradients in one: of kernels, MLP biases, and norms' scales.
    gradients = {"all-reduce [128,32] [128] [32,128] [32,32] [32,32] [32,32] [32,32] [32] [32] [8] [8]": 1}
    assert collectives(MODEL, (1, 8, 1), mesh, backward=True) == gathers | gradients


def test_replicas_only_reduce_gradients(mesh: MeshFactory) -> None:
    assert collectives(MODEL, (8, 1, 1), mesh) == {}
    assert list(collectives(MODEL, (8, 1, 1), mesh, backward=True).values()) == [1]


def test_tensor_parallelism_gathers_the_normed_stream_once_and_sums_what_meets_in_it_once(mesh: MeshFactory) -> None:
    stream = "[8,9,32]"
    gathered = f"all-gather {stream}"  # the normed stream, for all input projections
    # Attention's and the MLP's output together, one after the other in the sequential block.
    assert collectives(MODEL, (1, 1, 4), mesh) == {gathered: 1, f"all-reduce {stream}": 1}
    sequential = dataclasses.replace(MODEL, block="sequential")
    assert collectives(sequential, (1, 1, 4), mesh) == {gathered: 2, f"all-reduce {stream}": 2}
    assert collectives(MODEL, (1, 1, 4), mesh, backward=True) == {
        gathered: 2,  # and the output's gradient
        f"all-reduce {stream}": 1,
        # Gradients of the normed stream through query, key, value and up together, of QK-norms' scales, MLP out bias.
        f"all-reduce [32] {stream} [8] [8]": 1,
        "all-reduce [32]": 1,  # of the norm's scale
        "all-gather [128]": 1,  # of the MLP up bias, which is replicated
    }


def test_images_that_model_does_not_divide_are_split_in_their_width_which_norms_sum(mesh: MeshFactory) -> None:
    norm, stream = "all-reduce [6,9]", "[6,9,32]"  # the norm's mean square over the width; the stream
    gathered = f"all-gather {stream}"
    assert collectives(MODEL, (1, 1, 4), mesh, batch=6) == {norm: 1, gathered: 1, f"all-reduce {stream}": 1}
    assert collectives(MODEL, (1, 1, 4), mesh, backward=True, batch=6) == {
        norm: 2,  # and its gradient
        gathered: 2,  # and the output's gradient
        f"all-reduce {stream}": 1,
        # Gradient of the normed stream through query, key, value and up together, and of the QK-norms' scales.
        f"all-reduce {stream} [8] [8]": 1,
        "all-gather [32]": 2,  # gradients of vectors, which are replicated: norm scale, MLP out bias
        "all-gather [128]": 1,  # MLP up bias
    }


def test_all_axes_together_communicate_what_each_does_alone(mesh: MeshFactory) -> None:
    assert collectives(MODEL, (2, 2, 2), mesh) == {
        "all-gather [32,16]": 3,  # over data: query, key, value; they stay split over model
        "all-gather [16,32]": 1,  # attention out
        "all-gather [32,64]": 1,  # MLP up
        "all-gather [64,32]": 1,  # MLP out
        "all-gather [2,9,32]": 1,  # over model, for a quarter of the batch: as above
        "all-reduce [2,9,32]": 1,
    }
