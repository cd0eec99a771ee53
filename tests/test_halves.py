"""Halves of a batch in turns against the whole batch: values, gradients, order, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, assert_same_gradients, loss_and_named_gradients
from jax.sharding import NamedSharding, use_abstract_mesh

from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.halves import Halves, split, take_turns
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.sharding import BATCH, BY_IMAGE, abstract_mesh, check_divisibility, concrete

MODEL = ModelConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=8, image_size=8, patch_size=4, matmul="fp32", pool="gap",
    head_bias=0.1, scan_unroll=2,
)  # fmt: skip
VARIANTS = {
    "unrolled": {},
    "scanned": {"scan_unroll": 1},
    "rematerialised": {"remat": "full"},
    "sequential": {"block": "sequential", "mlp": "swiglu", "layer_scale": 0.1, "proj_bias": True, "pool": "map"},
    "stochastic depth": {"stochastic_depth": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_are_those_of_the_whole_batch(variant: str, mesh: MeshFactory) -> None:
    config = dataclasses.replace(MODEL, **VARIANTS[variant])
    loss, expected = loss_and_named_gradients(config, (1, 1, 1), mesh)
    found, gradients = loss_and_named_gradients(dataclasses.replace(config, overlap="halves"), (1, 2, 2), mesh)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_features_are_those_of_the_whole_batch_in_its_order(mesh: MeshFactory) -> None:
    images, found = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32), []
    for overlap in ("none", "halves"):
        with mesh(1, 1, 4):
            config = dataclasses.replace(MODEL, overlap=overlap)
            model = jax.jit(lambda config=config: ViT(config, jax.random.key(0)))()
            found.append(jax.jit(lambda m, x: m(x, layers=(1, 0)))(model, images))
    for whole, halves in zip(*found, strict=True):
        np.testing.assert_allclose(halves, whole, rtol=0, atol=1e-5)


def test_gradients_of_kernels_are_summed_over_data_once_for_both_halves(mesh: MeshFactory) -> None:
    summed = {}
    for overlap in ("none", "halves"):
        config = dataclasses.replace(MODEL, overlap=overlap)
        with mesh(1, 2, 2) as m:
            images = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32, sharding=NamedSharding(m, BATCH))
            gradient = jax.jit(jax.grad(lambda model, x: jnp.sum(model(x).logits)))
            text = gradient.lower(concrete(abstract_model(config), m), images).compile().as_text()
        shapes = re.findall(r"f32\[(\d+),(\d+)\]", " ".join(re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)))
        summed[overlap] = sum(int(rows) * int(columns) for rows, columns in shapes)
    in_blocks = 2 * (4 * 32 * 32 + 2 * 32 * 64) // 2  # of two layers, split over 'model'
    assert in_blocks <= summed["halves"] == summed["none"] < 2 * in_blocks


@pytest.mark.parametrize(("changes", "turns"), [({}, 2 * 2), ({"block": "sequential"}, 2 * 4)])
def test_each_turn_but_the_first_begins_when_the_other_halfs_is_over(changes: dict, turns: int) -> None:
    """By a barrier between what it reads, gathered, and what the other gave, not yet summed."""
    config = dataclasses.replace(MODEL, overlap="halves", **changes)
    with use_abstract_mesh(abstract_mesh((1, 1, 4))):
        images = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda m, x: m(x).logits)(abstract_model(config), images)
    barriers = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    assert len(barriers) == turns - 1
    given: set = set()
    for eqn in barriers:
        read, sums = (v.aval for v in eqn.invars)
        assert read.shape == sums.shape == (4, 4, 32)
        assert read.sharding.spec.reduced == sums.sharding.spec.unreduced == {"model"}
        assert not given & set(eqn.invars)  # sums that have been waited for are not waited for again
        given |= set(eqn.outvars)


def test_images_change_places_but_not_devices(mesh: MeshFactory) -> None:
    x = np.arange(16 * 3 * 2, dtype=np.float32).reshape(16, 3, 2)
    with mesh(2, 1, 4) as m:
        placed = jax.device_put(x, NamedSharding(m, BY_IMAGE))
        parted = jax.jit(split).lower(placed).compile()
        rejoined = jax.jit(lambda halves: Halves(halves).joined()).lower(parted(placed)).compile()
        np.testing.assert_array_equal(np.sort(np.concatenate(parted(placed)), 0), x)
        np.testing.assert_array_equal(rejoined(parted(placed)), x)
    for program in (parted, rejoined):
        assert not re.search("all-gather|all-to-all|all-reduce|reduce-scatter|collective", program.as_text())


@pytest.mark.parametrize(
    ("shape", "batch", "expected"), [((1, 1, 4), 8, True), ((2, 2, 2), 8, False), ((8, 1, 1), 16, False)]
)
def test_turns_are_taken_where_each_device_has_as_many_of_either_half(shape: tuple, batch: int, expected: bool) -> None:
    with use_abstract_mesh(abstract_mesh(shape)):
        assert take_turns(dataclasses.replace(MODEL, overlap="halves"), batch) == expected
        assert not take_turns(MODEL, batch)


def test_a_batch_that_has_no_such_halves_is_refused_with_one_that_has() -> None:
    recipe = Recipe(
        name="t", total_steps=1, batch_size=24, model=dataclasses.replace(MODEL, overlap="halves"),
        data=DataConfig(train="digits", validation="digits"),
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"batch_size=24: must be a multiple of 16 = .* mesh.model=4 .*; try 16$"):
        check_divisibility(recipe, (1, 2, 4))
    check_divisibility(dataclasses.replace(recipe, batch_size=16), (1, 2, 4))
    check_divisibility(recipe, (1, 8, 1))
