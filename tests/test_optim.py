"""Optimizers, schedules and the update of a train step, recomputed in NumPy float64; and on eight devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MeshFactory
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh

from vit22b.config import DataConfig, OptimConfig, Recipe
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.optim import add_weight_decay, clip, global_norm, make_optimizer, schedule
from vit22b.sharding import BATCH, abstract_mesh, concrete, spec_of
from vit22b.step import TrainState, init_state, loss_and_gradients, train_step

# Parameters named as a model's are. Stacked vectors are as large as a matrix that would be factored.
SHAPES = {
    "blocks": {"query": (2, 32, 48), "out": (2, 64, 40), "gate": (2, 16, 64), "up_bias": (40, 48), "scale": (33, 32)},
    "patch_kernel": (48, 40),
    "position": (36, 40),
    "head_kernel": (40, 33),
    "head_bias": (33,),
}
BODY_DECAY, HEAD_DECAY = 0.03, 3.0
RATES = (0.05, 0.1, 0.1, 0.1, 0.05)  # warm-up over two of five steps, cooldown over the last two
BASE = OptimConfig(
    learning_rate=0.1, schedule="wsd", warmup_steps=2, cooldown_steps=2, weight_decay=BODY_DECAY,
    head_weight_decay=HEAD_DECAY, beta1=0.9, beta2=0.6, clip_norm=0.0,
)  # fmt: skip
LOUDNESS = (1.0, 3.0, 0.1, 1.0, 2.0)  # of the five gradients

Arrays = dict[str, np.ndarray]


def parameters_and_gradients(optimizer: str) -> tuple[dict, list[dict]]:
    """Normal values for SHAPES, and each layer of the stacked matrices again as parameters of their own.

    The gradients of 'head_bias' are so small that the optimizer's epsilon counts.
    """
    rng = np.random.default_rng(0)

    def draw(loudness: float, faintness: float) -> dict:
        tree = jax.tree.map(lambda s: rng.normal(size=s) * loudness, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
        tree["head_bias"] *= faintness
        tree["alone"] = {str(i): {key: tree["blocks"][key][i] for key in ("query", "out")} for i in range(2)}
        return jax.tree.map(np.float32, tree)

    faintness = 1e-15 if optimizer == "adafactor" else 1e-8
    return draw(1.0, 1.0), [draw(loudness, faintness) for loudness in LOUDNESS]


@functools.cache
def run(mesh: MeshFactory, name: str, **changes) -> tuple[list[Arrays], list[Arrays], optax.OptState]:
    """The parameters before each of five updates, the updates, and the last state."""
    config = dataclasses.replace(BASE, name=name, **changes)
    optimizer = make_optimizer(config, total_steps=len(RATES))
    parameters, gradients = parameters_and_gradients(name)
    before, updates = [], []
    with mesh():

        @jax.jit
        def step(gradient, state, parameters):
            clipped, _ = clip(gradient, config.clip_norm, unrolled=True)
            return optimizer.update(clipped, state, parameters)

        state = jax.jit(optimizer.init)(parameters)
        for gradient in gradients:
            update, state = step(gradient, state, parameters)
            before.append(named_leaves(parameters))
            updates.append(named_leaves(jax.tree.map(np.asarray, update)))
            parameters = jax.tree.map(np.add, parameters, update)
    return before, updates, state


def is_matrix(name: str) -> bool:
    return name.split("/")[-1] in ("query", "out", "gate", "patch_kernel", "head_kernel")


def adamw_by_hand(name: str, gradients: list[np.ndarray]) -> Iterator[np.ndarray]:
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.6 * v + 0.4 * g**2
        yield m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.6**t)) + 1e-8)


def adafactor_by_hand(name: str, gradients: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Row and column means of the squares; their product over their common mean stands for each square."""
    m = v = rows = columns = 0.0
    for t, g in enumerate(gradients, 1):
        beta, squares = min(0.6, 1 - t**-0.8), g**2 + 1e-30  # 0 at first; the cap counts from t = 4 on
        if is_matrix(name) and min(g.shape[-2:]) >= 32:
            rows = beta * rows + (1 - beta) * squares.mean(axis=-1, keepdims=True)
            columns = beta * columns + (1 - beta) * squares.mean(axis=-2, keepdims=True)
            v = rows * columns / rows.mean(axis=-2, keepdims=True)
        else:
            v = beta * v + (1 - beta) * squares
        m = 0.9 * m + 0.1 * g / np.sqrt(v)
        yield m


def muon_by_hand(name: str, gradients: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Five rounds of Newton-Schulz act on the singular values alone. Nesterov's momentum, bias-corrected."""
    if not name.startswith(("blocks", "alone")) or not is_matrix(name):
        yield from adamw_by_hand(name, gradients)
        return
    m = 0.0
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        u, s, vt = np.linalg.svd(0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t), full_matrices=False)
        s = s / np.sqrt((s**2).sum(axis=-1, keepdims=True))
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        yield 0.2 * math.sqrt(max(g.shape[-2:])) * (u * s[..., None, :]) @ vt


BY_HAND: dict[str, Callable[[str, list[np.ndarray]], Iterator[np.ndarray]]] = {
    "adamw": adamw_by_hand,
    "adafactor": adafactor_by_hand,
    "muon": muon_by_hand,
}


def assert_updates_by_hand(
    optimizer: str, before: list[Arrays], updates: list[Arrays], gradients: list[Arrays], tolerance: float
) -> None:
    for name in before[0]:
        decay = {"head_kernel": HEAD_DECAY}.get(name, BODY_DECAY if is_matrix(name) else 0.0)
        directions = BY_HAND[optimizer](name, [g[name].astype(np.float64) for g in gradients])
        for step, direction in enumerate(directions):
            expected = -RATES[step] * (direction + decay * before[step][name])
            atol = tolerance * np.abs(expected).max()
            np.testing.assert_allclose(updates[step][name], expected, rtol=0, atol=atol, err_msg=f"{name}, {step}")


@pytest.mark.parametrize(
    ("name", "momentum_dtype", "tolerance"),
    [
        ("adamw", "fp32", 1e-5),
        ("adafactor", "fp32", 1e-5),
        ("muon", "fp32", 1e-4),  # Newton-Schulz multiplies small singular values, and their rounding, by up to 3.4^5
        # In four steps before the last, 0.9, its product with the momentum, and the new momentum are rounded to 8 bits.
        ("adamw", "bf16", 4 * 3 * 2**-9),
        ("adafactor", "bf16", 4 * 3 * 2**-9),
    ],
)
def test_updates_equal_those_by_hand(name: str, momentum_dtype: str, tolerance: float, mesh: MeshFactory) -> None:
    before, updates, _ = run(mesh, name, momentum_dtype=momentum_dtype)
    gradients = [named_leaves(g) for g in parameters_and_gradients(name)[1]]
    assert_updates_by_hand(name, before, updates, gradients, tolerance)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_bf16_momentum_leaves_the_rest_of_the_state_as_it_is(name: str, mesh: MeshFactory) -> None:
    config = dataclasses.replace(BASE, name=name, momentum_dtype="bf16")
    with mesh():
        state = jax.eval_shape(make_optimizer(config, total_steps=5).init, parameters_and_gradients(name)[0])
    for path, leaf in named_leaves(state).items():
        momentum = {"mu", "ema"} & set(path.split("/"))
        assert leaf.dtype == ("bfloat16" if momentum else "int32" if path.endswith("count") else "float32"), path


def test_gradients_are_clipped_by_the_norm_over_all_parameters(mesh: MeshFactory) -> None:
    gradients = [named_leaves(g) for g in parameters_and_gradients("adamw")[1]]
    norms = [math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values())) for gradient in gradients]
    assert [norm > 100 for norm in norms] == [True, True, False, True, True]
    clipped = [
        {name: g.astype(np.float64) * min(1, 100 / norm) for name, g in gradient.items()}
        for gradient, norm in zip(gradients, norms, strict=True)
    ]
    before, updates, _ = run(mesh, "adamw", clip_norm=100.0)
    assert_updates_by_hand("adamw", before, updates, clipped, 1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_norm_is_that_of_all_elements_of_all_layers(unrolled: bool) -> None:
    gradients = parameters_and_gradients("adamw")[1][1]
    square = sum((g.astype(np.float64) ** 2).sum() for g in named_leaves(gradients).values())
    assert float(global_norm(gradients, unrolled)) == pytest.approx(math.sqrt(square), rel=1e-6)


@pytest.mark.parametrize(("name", "tolerance"), [("adafactor", 1e-5), ("muon", 1e-4)])  # as above
def test_each_layer_of_a_stack_is_updated_as_if_alone(name: str, tolerance: float, mesh: MeshFactory) -> None:
    _, updates, _ = run(mesh, name, momentum_dtype="fp32")
    for update in updates:
        for key in ("query", "out"):
            for i in range(2):
                alone = update[f"alone/{i}/{key}"]
                atol = tolerance * np.abs(alone).max()
                np.testing.assert_allclose(update[f"blocks/{key}"][i], alone, rtol=0, atol=atol)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_and_all_of_vectors(mesh: MeshFactory) -> None:
    *_, state = run(mesh, "adafactor", momentum_dtype="fp32")
    second = [moments(state, field) for field in ("v_row", "v_col", "v")]
    shapes = {name: sorted(leaf[name].shape for leaf in second) for name in second[0] if "alone" not in name}
    none = (1,)  # a placeholder
    assert shapes == {
        "blocks/query": [none, (2, 32), (2, 48)],
        "blocks/out": [none, (2, 40), (2, 64)],
        "blocks/gate": [none, none, (2, 16, 64)],  # 16 < 32
        "blocks/up_bias": [none, none, (40, 48)],
        "blocks/scale": [none, none, (33, 32)],
        "patch_kernel": [none, (40,), (48,)],
        "position": [none, none, (36, 40)],
        "head_kernel": [none, (33,), (40,)],
        "head_bias": [none, none, (33,)],
    }


def test_muon_makes_matrices_orthogonal_with_the_rms_of_adamw(mesh: MeshFactory) -> None:
    before, updates, _ = run(mesh, "muon", momentum_dtype="fp32")
    for parameters, update, rate in zip(before, updates, RATES, strict=True):
        for name, largest in {"blocks/query": 48, "blocks/out": 64, "alone/0/query": 48, "alone/0/out": 64}.items():
            direction = -update[name] / rate - BODY_DECAY * parameters[name]
            values = np.linalg.svd(direction, compute_uv=False) / (0.2 * math.sqrt(largest))
            assert values.min() > 0.6, name  # five steps of Newton-Schulz with these coefficients
            assert values.max() < 1.25, name  # bring singular values near 1, not to 1
            assert 0.2 * 0.8 < np.sqrt((direction**2).mean()) < 0.2 * 1.1, name


def test_muon_is_adamw_for_what_is_no_matrix_of_a_block(mesh: MeshFactory) -> None:
    _, updates, _ = run(mesh, "muon", momentum_dtype="fp32")
    _, expected, _ = run(mesh, "adamw", momentum_dtype="fp32")
    for update, other in zip(updates, expected, strict=True):
        for name in ("blocks/up_bias", "blocks/scale", "patch_kernel", "position", "head_kernel", "head_bias"):
            np.testing.assert_array_equal(update[name], other[name], err_msg=name)


TINY = ModelConfig(
    width=32, depth=2, mlp_dim=64, num_heads=2, num_classes=40, image_size=8, patch_size=4, pool="gap", matmul="fp32"
)  # fmt: skip
# Together the next two have every parameter there is.
PARALLEL = dataclasses.replace(
    TINY, mlp="swiglu", num_registers=2, pool="map", layer_scale=0.1, norm_bias=True, qkv_bias=True, proj_bias=True
)
SEQUENTIAL = dataclasses.replace(TINY, block="sequential", class_token=True, pool="cls", norm_bias=True)

DECAYED = {
    "patch_kernel",
    "blocks/attention/query", "blocks/attention/key", "blocks/attention/value", "blocks/attention/out",
    "blocks/mlp/gate", "blocks/mlp/up", "blocks/mlp/out",
    "map_head/attention/query", "map_head/attention/key", "map_head/attention/value", "map_head/attention/out",
    "map_head/mlp/gate", "map_head/mlp/up", "map_head/mlp/out",
}  # fmt: skip
NOT_DECAYED = {
    "patch_bias", "position", "prefix", "norm/scale", "norm/bias", "head_bias",
    "blocks/norm/scale", "blocks/norm/bias", "blocks/mlp_norm/scale", "blocks/mlp_norm/bias",
    "blocks/attention/query_bias", "blocks/attention/key_bias", "blocks/attention/value_bias",
    "blocks/attention/out_bias", "blocks/attention/scale",
    "blocks/attention/query_norm/scale", "blocks/attention/query_norm/bias",
    "blocks/attention/key_norm/scale", "blocks/attention/key_norm/bias",
    "blocks/mlp/gate_bias", "blocks/mlp/up_bias", "blocks/mlp/out_bias", "blocks/mlp/scale",
    "map_head/probe", "map_head/norm/scale", "map_head/norm/bias",
    "map_head/attention/query_bias", "map_head/attention/key_bias", "map_head/attention/value_bias",
    "map_head/attention/out_bias", "map_head/mlp/gate_bias", "map_head/mlp/up_bias", "map_head/mlp/out_bias",
}  # fmt: skip


def test_every_parameter_is_in_the_decay_group_of_its_kind() -> None:
    """Without a gradient, the direction of a parameter of ones is its decay."""
    decay, groups = add_weight_decay(OptimConfig(weight_decay=0.25, head_weight_decay=0.5)), {}
    for config in (PARALLEL, SEQUENTIAL):
        with use_abstract_mesh(abstract_mesh((1, 1, 1))):
            shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_model(config))
        ones, zeros = (jax.tree.map(f, shapes, is_leaf=lambda x: isinstance(x, tuple)) for f in (np.ones, np.zeros))
        directions, _ = decay.update(zeros, optax.EmptyState(), ones)
        for name, direction in named_leaves(directions).items():
            assert len(np.unique(direction)) == 1, name
            assert groups.setdefault(name, direction.flat[0]) == direction.flat[0], name
    assert groups == dict.fromkeys(DECAYED, 0.25) | dict.fromkeys(NOT_DECAYED, 0.0) | {"head_kernel": 0.5}


@pytest.mark.parametrize(
    ("changes", "total_steps", "rates"),
    [
        # ViT-22B's: 1e-3 / sqrt(1 + (step - 10k) / 10k), to 0 over the last 30k
        (
            {"schedule": "rsqrt", "learning_rate": 1e-3, "warmup_steps": 10_000, "cooldown_steps": 30_000},
            177_000,
            {0: 1e-7, 4_999: 5e-4, 9_999: 1e-3, 10_000: 1e-3, 40_000: 5e-4, 147_000: 2.60820e-4, 162_000: 1.242260e-4,
             176_999: 7.92306e-9},
        ),
        (
            {"schedule": "rsqrt", "learning_rate": 2.0, "timescale_steps": 10, "cooldown_steps": 10,
             "final_fraction": 0.5},
            100,
            {0: 2.0, 30: 1.0, 80: 0.666667, 95: 0.75 * 0.617213, 100: 0.5 * 0.603023},
        ),
        (
            {"schedule": "cosine", "learning_rate": 2.0, "warmup_steps": 20, "final_fraction": 0.1},
            120,
            {0: 0.1, 9: 1.0, 19: 2.0, 20: 2.0, 45: 1.7363961, 70: 1.1, 95: 0.4636039, 119: 0.2004441, 120: 0.2},
        ),
        ({"schedule": "cosine", "learning_rate": 1.0}, 4, {0: 1.0, 1: 0.8535534, 2: 0.5, 3: 0.1464466, 4: 0.0}),
        (
            {"schedule": "wsd", "learning_rate": 1.0, "warmup_steps": 10, "cooldown_steps": 20, "final_fraction": 0.25},
            100,
            {0: 0.1, 5: 0.6, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.625, 95: 0.4375, 99: 0.2875, 100: 0.25},
        ),
        ({"schedule": "constant", "learning_rate": 0.5, "warmup_steps": 10}, 100, {0: 0.05, 4: 0.25, 9: 0.5, 99: 0.5}),
        ({"schedule": "constant", "learning_rate": 0.5}, 100, {0: 0.5, 50: 0.5, 99: 0.5}),
    ],
    ids=["rsqrt-22B", "rsqrt", "cosine", "cosine-plain", "wsd", "constant", "constant-plain"],
)  # fmt: skip
def test_learning_rates_equal_those_by_hand(changes: dict, total_steps: int, rates: dict[int, float]) -> None:
    config = OptimConfig(**changes)
    config.validate(total_steps)
    got = jax.vmap(schedule(config, total_steps))(jnp.array(list(rates)))
    np.testing.assert_allclose(got, list(rates.values()), rtol=3e-6, atol=1e-7 * config.learning_rate)


def random_model(config: ModelConfig, mesh: Mesh, seed: int = 0) -> ViT:
    """Every parameter away from zero, so that every gradient is."""
    abstract, rng = concrete(abstract_model(config), mesh), np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0.2, 0.2, size=leaf.shape).astype(np.float32), leaf.sharding), abstract
    )


def random_batch(recipe: Recipe, mesh: Mesh) -> dict[str, jax.Array]:
    rng, size = np.random.default_rng(1), recipe.model.image_size
    images = rng.integers(256, size=(recipe.batch_size, size, size, 3), dtype=np.uint8)
    labels = rng.integers(recipe.model.num_classes, size=recipe.batch_size, dtype=np.int32)
    return jax.device_put({"image": images, "label": labels}, NamedSharding(mesh, BATCH))


RECIPE = Recipe(
    name="tiny", total_steps=10, batch_size=16, model=TINY,
    data=DataConfig(train="synthetic", validation="synthetic"),
    optim=OptimConfig(schedule="constant", learning_rate=0.1, warmup_steps=2, weight_decay=0.1, ema_decay=0.75),
)  # fmt: skip


def test_gradients_of_microbatches_on_eight_devices_add_up_to_the_whole_batchs_on_one(mesh: MeshFactory) -> None:
    results = []
    for shape, accumulate_steps in (((1, 1, 1), 1), ((2, 2, 2), 4)):
        optim = dataclasses.replace(RECIPE.optim, accumulate_steps=accumulate_steps)
        recipe = dataclasses.replace(RECIPE, optim=optim)
        with mesh(*shape) as m:
            inputs = random_model(TINY, m), random_batch(recipe, m), jax.random.key(0)
            (loss, _), gradients = jax.jit(functools.partial(loss_and_gradients, recipe))(*inputs)
            results.append(({"loss": loss}, named_leaves(gradients)))
    for one, many in zip(*results, strict=True):
        for name, value in one.items():
            value = np.asarray(value)
            atol = 1e-5 * max(1.0, np.abs(value).max())
            np.testing.assert_allclose(many[name], value, rtol=0, atol=atol, err_msg=name)


@functools.cache
def compiled_train_step(mesh: MeshFactory) -> tuple[Callable, TrainState, dict]:
    with mesh() as m:
        state = jax.jit(functools.partial(init_state, RECIPE))()
        state = dataclasses.replace(state, model=random_model(TINY, m), ema=random_model(TINY, m, seed=1))
        batch = random_batch(RECIPE, m)
        return jax.jit(functools.partial(train_step, RECIPE)).lower(state, batch).compile(), state, batch


def test_ema_equals_the_average_by_hand_and_rates_are_reported(mesh: MeshFactory) -> None:
    step, state, batch = compiled_train_step(mesh)
    expected = {name: np.asarray(value, np.float64) for name, value in named_leaves(state.ema).items()}
    for number, rate in enumerate((0.05, 0.1, 0.1)):
        old = named_leaves(state.model)
        state, metrics = step(state, batch)
        assert int(state.step) == number + 1
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        for name, value in named_leaves(state.model).items():
            assert (np.asarray(value) != np.asarray(old[name])).any(), name
            expected[name] = 0.75 * expected[name] + 0.25 * np.asarray(value, np.float64)
        for name, value in named_leaves(state.eval_model).items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_only_the_step_count(what: str, mesh: MeshFactory) -> None:
    step, state, batch = compiled_train_step(mesh)
    state, _ = step(state, batch)
    good = state.model.head_kernel[...]
    # NaN reaches the loss. Weights of 1e30 give a finite loss, and gradients whose squares overflow.
    state.model.head_kernel[...] = good * (jnp.nan if what == "loss" else 1e30)
    after, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) == (what == "gradient")
    assert not np.isfinite(metrics["gradient_norm"])
    assert int(after.step) == int(state.step) + 1
    for field in ("model", "opt_state", "ema"):
        expected = named_leaves(getattr(state, field))
        for name, value in named_leaves(getattr(after, field)).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{field}/{name}")


def moments(state: optax.OptState, field: str) -> dict:
    """A field of the state, such as 'mu', by the names of the parameters, from all groups of parameters."""
    paths = {path.partition(f"/{field}/"): leaf for path, leaf in named_leaves(state).items()}
    return {name: leaf for (_, separator, name), leaf in paths.items() if separator}


def shape_and_spec(leaf) -> tuple[tuple, tuple]:
    return leaf.shape, (*spec_of(leaf), *(None,) * (leaf.ndim - len(spec_of(leaf))))


def without(item: tuple[tuple, tuple], dim: int) -> tuple[tuple, tuple]:
    """A shape and spec with one dim (-1 or -2) gone."""
    return tuple(x[:-1] if dim == -1 else (*x[:-2], x[-1]) for x in item)


def test_optimizer_state_is_sharded_like_the_parameters(mesh: MeshFactory) -> None:
    with mesh(2, 2, 2):
        parameters = {name: shape_and_spec(leaf) for name, leaf in named_leaves(abstract_model(TINY)).items()}
        assert any("data" in spec and "model" in spec for _, spec in parameters.values())
        states = {
            name: jax.eval_shape(make_optimizer(OptimConfig(name=name), 1).init, abstract_model(TINY))
            for name in BY_HAND
        }
    for optimizer, field in (("adamw", "mu"), ("adamw", "nu"), ("adafactor", "ema"), ("muon", "mu")):
        assert {name: shape_and_spec(leaf) for name, leaf in moments(states[optimizer], field).items()} == parameters
    for name, leaf in moments(states["muon"], "nu").items():
        assert shape_and_spec(leaf) == parameters[name]
    second = [moments(states["adafactor"], field) for field in ("v_row", "v_col", "v")]
    for name, parameter in parameters.items():
        kept = [shape_and_spec(leaf[name]) for leaf in second if leaf[name].shape != (1,)]
        factored = name in DECAYED | {"head_kernel"}
        expected = [without(parameter, -1), without(parameter, -2)] if factored else [parameter]
        assert sorted(kept, key=str) == sorted(expected, key=str), name


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("adafactor", 1e-5), ("muon", 1e-4)])  # as above
def test_updates_on_eight_devices_equal_those_on_one_and_stay_sharded(
    name: str, tolerance: float, mesh: MeshFactory
) -> None:
    optimizer = make_optimizer(OptimConfig(name=name, schedule="constant", weight_decay=0.1), 1)
    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with mesh(*shape) as m:
            parameters, gradients = random_model(TINY, m), random_model(TINY, m, seed=1)
            state, step = jax.jit(optimizer.init)(parameters), jax.jit(optimizer.update)
            places = [leaf.sharding for leaf in jax.tree.leaves((parameters, state))]
            for gradient in (gradients, parameters):
                updates, state = step(gradient, state, parameters)
                for leaf, place in zip(jax.tree.leaves((updates, state)), places, strict=True):
                    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            results.append({name: np.asarray(update) for name, update in named_leaves(updates).items()})
    for path, one in results[0].items():
        np.testing.assert_allclose(results[1][path], one, rtol=0, atol=tolerance * np.abs(one).max(), err_msg=path)
