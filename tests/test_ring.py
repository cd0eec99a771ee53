"""Rings against the collectives they replace, and whole models with them against models without."""

import collections
import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, assert_same_gradients, loss_and_named_gradients
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from vit22b import ring, sharding
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.hlo import Replay, parse
from vit22b.linear import column_parallel, read_as, row_parallel
from vit22b.model_config import ModelConfig
from vit22b.sharding import HIDDEN, RESIDUAL
from vit22b.step import abstract_state, compile_train_step

MODEL = ModelConfig(
    width=32, depth=2, mlp_dim=64, num_heads=8, num_classes=8, image_size=8, patch_size=4, matmul="fp32", pool="gap",
    head_bias=0.1,
)  # fmt: skip


def on_ring(function, *arguments: np.ndarray, count: int, mesh: MeshFactory):
    """`function` on each device's row of the arguments, with the axis's name; rows of results, stacked."""
    with mesh(1, 1, count):
        local = jax.shard_map(
            lambda *rows: jax.tree.map(lambda y: y[None], function(*(row[0] for row in rows), "model")),
            in_specs=P("model"),
            out_specs=P("model"),
            check_vma=False,
        )
        return jax.tree.map(np.asarray, jax.jit(local)(*(reshard(jnp.asarray(x), P("model")) for x in arguments)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_what_is_gathered_is_every_chunk_once_with_its_owners_index(count: int, mesh: MeshFactory) -> None:
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)

    def function(row, axis):
        indices, chunks = zip(*ring.gathered(row, axis), strict=True)
        return jnp.stack(indices), jnp.stack(chunks)

    indices, chunks = on_ring(function, x, count=count, mesh=mesh)
    for device in range(count):
        assert sorted(indices[device]) == list(range(count))
        assert indices[device][0] == device  # its own first: it can be used at once
        np.testing.assert_array_equal(chunks[device], x[indices[device]])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_what_is_scattered_is_the_sum_of_all_devices_parts(count: int, mesh: MeshFactory) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (count, count, 3)).astype(np.float32)
    sums = on_ring(lambda row, axis: ring.scattered(lambda i: row[i], axis), x, count=count, mesh=mesh)
    np.testing.assert_array_equal(sums, x.sum(0))


@pytest.mark.parametrize("count", [2, 5, 8])
def test_no_chunk_travels_further_than_half_the_ring(count: int, mesh: MeshFactory) -> None:
    with mesh(1, 1, count):
        local = jax.shard_map(
            lambda x: ring.all_gather(x, "model", 0), in_specs=P("model"), out_specs=P(), check_vma=False
        )
        text = str(jax.make_jaxpr(local)(jnp.zeros((count, 2), out_sharding=P("model"))))
    hops = collections.Counter(re.sub(r"\s", "", pairs) for pairs in re.findall(r"perm=(\(.*?\)\s*\))", text))
    assert hops.total() == count - 1
    assert max(hops.values()) == count // 2


SHAPES = [(1, 1, 8), (1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_parallel_matmuls_equal_numpys(shape: tuple, mesh: MeshFactory) -> None:
    config = dataclasses.replace(MODEL, overlap="rings")
    rng = np.random.default_rng(1)
    x, *kernels = (rng.normal(size=s).astype(np.float32) for s in ((8, 3, 32), (32, 32), (32, 64)))
    outs = [rng.normal(size=s).astype(np.float32) for s in ((32, 32), (64, 32))]
    with mesh(*shape) as m:
        put = lambda value, spec: jax.device_put(value, NamedSharding(m, spec))  # noqa: E731
        ys = jax.jit(lambda x, w: column_parallel([reshard(x, read_as(config))], w, ["mlp"] * 2, config, None, False))(
            put(x, RESIDUAL), [put(w, P("data", "model")) for w in kernels]
        )
        z = jax.jit(lambda y, w: row_parallel(y, w, ["mlp"] * 2, config, False))(
            ys, [put(w, P("model", "data")) for w in outs]
        )
        assert all(jax.typeof(y).sharding.spec == HIDDEN for y in ys)
        assert jax.typeof(z).sharding.spec == RESIDUAL
    for y, w in zip(ys, kernels, strict=True):
        np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z, sum((x @ w) @ o for w, o in zip(kernels, outs, strict=True)), rtol=1e-4, atol=1e-3)


VARIANTS = {
    "parallel": {},
    "rematerialised": {"remat": "full"},
    "sequential": {"block": "sequential", "mlp": "swiglu", "layer_scale": 0.1, "proj_bias": True, "scan_unroll": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_are_those_without_rings(variant: str, mesh: MeshFactory) -> None:
    config = dataclasses.replace(MODEL, **VARIANTS[variant])
    loss, expected = loss_and_named_gradients(config, (1, 1, 1), mesh)
    for shape in ((1, 2, 4), (2, 2, 2)):
        ring_loss, gradients = loss_and_named_gradients(dataclasses.replace(config, overlap="rings"), shape, mesh)
        assert ring_loss == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(gradients, expected)


def test_in_bf16_rings_round_no_more_than_bf16_does(mesh: MeshFactory) -> None:
    """Against the fp32 model's gradients: chunks are added in bf16, which must not cost more than bf16 itself."""
    _, exact = loss_and_named_gradients(MODEL, (1, 1, 1), mesh)
    bf16 = dataclasses.replace(MODEL, matmul="bf16")
    _, plain = loss_and_named_gradients(bf16, (1, 2, 4), mesh)
    _, rings = loss_and_named_gradients(dataclasses.replace(bf16, overlap="rings"), (1, 2, 4), mesh)

    def error(gradients: dict) -> float:
        square = sum(np.sum((gradients[name] - exact[name]) ** 2) for name in exact)
        return float(np.sqrt(square / sum(np.sum(value**2) for value in exact.values())))

    assert 1e-4 < error(plain) < 0.05
    assert error(rings) < 1.5 * error(plain)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_layers_communicate_by_permutes_and_replicas_once_a_step(shape: tuple, mesh: MeshFactory) -> None:
    config = dataclasses.replace(MODEL, overlap="rings", depth=3)
    recipe = Recipe(
        name="t", total_steps=1, batch_size=8, model=config, data=DataConfig(train="digits", validation="digits")
    )
    with mesh(*shape) as m:
        compiled = compile_train_step(recipe, sharding.concrete(abstract_state(recipe), m))
    found = Replay(parse(compiled.as_text()), 8, None, 0.0, layer_trips=3).collectives
    kernel = 32 * 32 * 4 // (shape[1] * shape[2])  # bytes of the smallest kernel's shard
    in_layers = {c.kind for c in found if c.in_layers and c.bytes >= kernel}
    assert in_layers == {"collective-permute"}
    assert {c.runs for c in found if c.in_layers} == {3}
    # The sum over replicas: each kernel's shard of all layers, in fp32.
    summed = sum(c.bytes * c.runs for c in found if c.kind == "all-reduce" and not c.in_layers)
    kernels = 3 * (4 * 32 * 32 + 2 * 32 * 64) * 4 // (shape[1] * shape[2])
    replicas = shape[0]
    assert summed >= kernels * 2 * (replicas - 1) / replicas


def test_rematerialising_dots_with_rings_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model.remat='dots': .* one of none, full, attention"):
        dataclasses.replace(MODEL, overlap="rings", remat="dots").validate()


def test_several_layers_per_iteration_with_rings_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"model.scan_unroll=2: with model.overlap='rings' must be 1, or model.depth=4"
    ):
        dataclasses.replace(MODEL, overlap="rings", depth=4, scan_unroll=2).validate()
    dataclasses.replace(MODEL, overlap="rings", depth=4, scan_unroll=4).validate()


def chips(*dims: int) -> list:
    """Devices of a torus, in the order in which TPUs number them: the first dimension fastest."""
    ranges = [range(n) for n in reversed(dims)]
    return [SimpleNamespace(coords=tuple(reversed(c)), id=i) for i, c in enumerate(itertools.product(*ranges))]


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((8, 8, 16), (16, 16, 4)),
        ((8, 8, 16), (1, 256, 4)),
        ((4, 4, 4), (2, 4, 8)),
        ((4, 4, 1), (1, 2, 8)),
        ((4, 4, 1), (1, 4, 4)),
        ((2, 2, 4), (1, 4, 4)),
    ],
)
def test_neighbours_on_the_model_axis_are_neighbours_on_the_torus(dims: tuple, shape: tuple) -> None:
    placed = sharding.fold_onto_torus(shape, chips(*dims))
    assert placed is not None
    assert placed.shape == shape
    assert sorted(device.id for device in placed.flat) == list(range(np.prod(dims)))
    for row in placed.reshape(-1, shape[2]):
        for one, following in zip(row, [*row[1:], row[0]], strict=True):
            assert sum(abs(a - b) for a, b in zip(one.coords, following.coords, strict=True)) == 1
    if shape == (16, 16, 4):  # `data` is the ring of 16 chips
        for row in placed.transpose(0, 2, 1).reshape(-1, 16):
            assert [device.coords[2] for device in row] == list(range(16))


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((8, 8, 16), (8, 16, 8)),  # a dimension of the torus is a ring as it is
        ((8, 8, 16), (1, 512, 2)),
        ((8, 8, 16), (1, 1024, 1)),
        ((3, 5, 1), (1, 3, 5)),
    ],
)
def test_other_meshes_are_left_to_jax(dims: tuple, shape: tuple) -> None:
    assert sharding.fold_onto_torus(shape, chips(*dims)) is None


def test_devices_without_a_torus_are_left_to_jax() -> None:
    assert sharding.fold_onto_torus((1, 2, 4), [SimpleNamespace(id=i) for i in range(8)]) is None
