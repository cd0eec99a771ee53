"""The model against an independent NumPy one, and against itself on other meshes and computed in other ways."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import MeshFactory, named
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh

from vit22b.errors import RecipeError
from vit22b.model import REMAT, Output, ViT, abstract_model
from vit22b.model_config import LADDER, SIZES, ModelConfig, size
from vit22b.sharding import BATCH, abstract_mesh, concrete

TINY = ModelConfig(
    width=32, depth=3, mlp_dim=64, num_heads=4, num_classes=10, image_size=12, patch_size=4, matmul="fp32"
)
BIASES = {"norm_bias": True, "qkv_bias": True, "proj_bias": True}
CLASS = {"class_token": True, "pool": "cls"}
DEIT = {"block": "sequential", "norm": "layer", "qk_norm": "none", **BIASES}
# Together they take every choice there is: see test_the_configurations_take_every_choice.
CONFIGS = {
    name: dataclasses.replace(TINY, **changes)
    for name, changes in {
        "vit22b": {},
        "internvit": {"block": "sequential", "qk_norm": "width", "layer_scale": 0.1, **CLASS} | {"final_norm": "none"},
        "deit3": DEIT | CLASS | {"mlp": "gelu", "layer_scale": 0.1, "num_registers": 2},
        "dinov3": DEIT | {"mlp": "swiglu", "position": "rope", "class_token": True, "num_registers": 3, "pool": "gap"},
        "siglip": DEIT | {"position": "sincos", "num_registers": 1},
        "vit5": {
            "mlp": "swiglu",
            "mlp_bias": False,
            "layer_scale": 0.2,
            "position": "rope",
            "rope_base": 50.0,
        },
        "eva02": DEIT
        | {"mlp": "swiglu", "mlp_sub_norm": True, "position": "learned_rope", "rope_base": 20.0, "rope_grid": 5}
        | {"class_token": True, "pool": "gap", "final_norm": "pooled", "position_resampling": "cubic_plain"},
        "dinov2": DEIT | {"class_token": True, "num_registers": 1, "pool": "cls_gap", "position_resampling": "linear"},
        "mimetic": {"mlp": "gelu", "position": "sincos", "qkv_bias": True, "norm_bias": True, "pool": "gap"},
        "bag": {"norm": "layer", "norm_epsilon": 0.1, "qk_norm": "width", "proj_bias": True, "position": "none"},
    }.items()
}
PARALLEL, SEQUENTIAL = CONFIGS["vit22b"], CONFIGS["internvit"]
LAYERS = (2, 0)  # of three, and not in order


@pytest.fixture(autouse=True)
def _strict_dtypes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No implicit promotion while tracing, but in JAX's own attention, which promotes bf16 scores to fp32."""
    attention = jax.nn.dot_product_attention

    def lenient(*args, **kwargs) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return attention(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", lenient)
    with jax.numpy_dtype_promotion("strict"):
        yield


class Run(NamedTuple):
    weights: dict[str, np.ndarray]
    output: Output
    gradients: dict[str, np.ndarray]
    temporary_bytes: int


def random_model(config: ModelConfig, mesh: Mesh) -> ViT:
    """A model in which no parameter is special: scales around one, biases not zero, matrices that keep size."""
    abstract, rng = concrete(abstract_model(config), mesh), np.random.default_rng(0)
    values = []
    for name, leaf in named(abstract).items():
        spread = 0.3 if name.endswith(("bias", "scale")) else leaf.shape[-2] ** -0.5
        value = name.endswith("scale") + spread * rng.normal(size=leaf.shape)
        values.append(jax.device_put(value.astype(np.float32), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def random_images(config: ModelConfig, batch: int = 8) -> np.ndarray:
    """Of the native size for a table of positions; otherwise oblong, which tells rows from columns."""
    sides = (config.image_size,) * 2 if config.learns_positions else (8, 16)
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


COTANGENT = np.random.default_rng(2).normal(size=(8, TINY.num_classes)).astype(np.float32)


@functools.cache
def run(mesh: MeshFactory, config: ModelConfig, shape: tuple[int, int, int] = (1, 1, 1), batch: int = 8) -> Run:
    """Outputs, and gradients of sum(logits * COTANGENT), of the random model on a mesh of that shape."""

    def loss(model: ViT, images: jax.Array) -> tuple[jax.Array, Output]:
        output = model(images, layers=LAYERS)
        return jnp.sum(output.logits * COTANGENT[:batch]), output

    with mesh(*shape) as m:
        model, images = random_model(config, m), jax.device_put(random_images(config, batch), NamedSharding(m, BATCH))
        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(model, images)
        with jax.numpy_dtype_promotion("standard"):  # in bf16, JAX lowers its attention's gradient to mixed matmuls
            step = traced.lower().compile()
        (_, output), gradients, model = jax.tree.map(np.asarray, (*step(model, images), model))
    return Run(named(model), output, named(gradients), step.memory_analysis().temp_size_in_bytes)


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """To 1e-5 of the largest value, here mostly 1 to 10; of 1 where that is less, as for gradients that vanish."""
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
        "position": ("learned", "sincos", "rope", "learned_rope", "none"),
        "position_resampling": ("cubic", "cubic_plain", "linear"),
        "pool": ("map", "gap", "cls", "cls_gap"),
        "final_norm": ("tokens", "pooled", "none"),
    }.items():
        assert taken.pop(name) == set(choices)
    for name, values in taken.items():  # switches and numbers: off and on, or the default and another
        assert len(values) >= 2, name
    for config in CONFIGS.values():
        config.validate()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_reference(name: str, mesh: MeshFactory) -> None:
    config = CONFIGS[name]
    weights, output, *_ = run(mesh, config)
    expected = reference.forward(config, weights, random_images(config))
    assert_close(output.logits, expected.logits, "logits")
    assert_close(output.pooled, expected.pooled, "pooled")
    assert_close(output.tokens, expected.tokens, "tokens")
    assert_close(output.layers, expected.layers[list(LAYERS)], "layers")


def softmax_ignores(config: ModelConfig, name: str) -> bool:
    """A vector b added to all keys adds q.b to all scores of a query q. It matters if a norm or a rotation follows."""
    pooling = name.startswith("map_head")
    turned = config.rotates and not pooling
    normed = config.qk_norm != "none" and not pooling
    return not turned and (name.endswith("key_norm/bias") or (name.endswith("key_bias") and not normed))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_the_references_finite_differences_and_reach_every_row(name: str, mesh: MeshFactory) -> None:
    config = CONFIGS[name]
    weights, _, gradients, _ = run(mesh, config)
    images = random_images(config)

    def loss(parameter: str, step: np.ndarray) -> float:
        moved = weights | {parameter: weights[parameter] + step}
        return float(np.sum(reference.forward(config, moved, images).logits * COTANGENT))

    assert gradients.keys() == weights.keys()
    for parameter, gradient in gradients.items():
        direction = np.random.default_rng(3).normal(size=gradient.shape)
        slope = (loss(parameter, 1e-6 * direction) - loss(parameter, -1e-6 * direction)) / 2e-6
        norm = float(np.linalg.norm(gradient))  # the expected size of the slope
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=0, abs=1e-5 * max(1, norm)), parameter
        if softmax_ignores(config, parameter):
            assert norm < 1e-4, parameter
        else:
            assert np.abs(gradient.reshape(len(gradient), -1)).max(axis=1).min() > 1e-4, parameter


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("config", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
def test_eight_devices_equal_one(config: ModelConfig, shape: tuple[int, int, int], mesh: MeshFactory) -> None:
    assert_same_run(run(mesh, config, shape), run(mesh, config))


@pytest.mark.parametrize("config", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
def test_so_they_do_with_too_few_images_for_all_of_them(config: ModelConfig, mesh: MeshFactory) -> None:
    assert_same_run(run(mesh, config, (2, 2, 2), batch=4), run(mesh, config, batch=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_unroll": 2},  # does not divide the depth
        {"scan_unroll": 3},  # no loop
        *({"remat": name} for name in REMAT if name != "none"),
        {"remat": "full", "scan_unroll": 3},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_value_and_no_gradient(changes: dict, mesh: MeshFactory) -> None:
    shape = (2, 2, 2)
    assert_same_run(run(mesh, dataclasses.replace(PARALLEL, **changes), shape), run(mesh, PARALLEL, shape))


def residual_bytes(config: ModelConfig) -> int:
    """What the forward pass keeps for the backward pass, parameters included."""
    images = jax.ShapeDtypeStruct((8, config.image_size, config.image_size, 3), jnp.float32)
    with use_abstract_mesh(abstract_mesh((1, 1, 1))):
        backward = jax.eval_shape(lambda m, x: jax.vjp(lambda m: m(x).logits, m)[1], abstract_model(config), images)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_remat_keeps_what_its_policy_names_and_no_more(mesh: MeshFactory) -> None:
    c = ModelConfig(**size("Ti", SIZES), num_classes=10, patch_size=16)
    kept = {name: residual_bytes(dataclasses.replace(c, remat=name)) for name in REMAT}
    bf16_per_layer = c.depth * 8 * c.num_tokens * 2
    assert kept["attention"] - kept["full"] == bf16_per_layer * c.width
    assert kept["dots"] - kept["full"] == bf16_per_layer * (3 * c.width + c.mlp_dim)
    assert kept["none"] > 2 * kept["dots"]
    for name in ("dots", "attention", "full"):  # and the compiler undoes none of it
        compiled = run(mesh, dataclasses.replace(PARALLEL, remat=name), (2, 2, 2))
        assert compiled.temporary_bytes < run(mesh, PARALLEL, (2, 2, 2)).temporary_bytes / 2


@pytest.mark.parametrize("config", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
def test_bf16_differs_by_rounding_and_dtypes_are_as_documented(config: ModelConfig, mesh: MeshFactory) -> None:
    expected = run(mesh, config, (2, 2, 2))
    actual = run(mesh, dataclasses.replace(config, matmul="bf16"), (2, 2, 2))
    dtypes = {name: value.dtype.name for name, value in actual.output._asdict().items()}
    assert dtypes == {"logits": "float32", "pooled": "float32", "tokens": "bfloat16", "layers": "bfloat16"}
    assert {value.dtype.name for value in (*actual.weights.values(), *actual.gradients.values())} == {"float32"}
    for name, value in expected.output._asdict().items():
        # A rounding to 8 bits is off by 0.1 % (RMS); some thirty in a row, in three layers, by 0.6 %.
        difference = getattr(actual.output, name).astype(np.float32) - value
        assert 5e-4 < np.linalg.norm(difference) / np.linalg.norm(value) < 0.02, name


@pytest.mark.parametrize("layers", [(3,), (-1,), (1, 1)])
def test_layers_that_cannot_be_returned_are_refused(layers: tuple[int, ...]) -> None:
    with use_abstract_mesh(abstract_mesh((1, 1, 1))), pytest.raises(ValueError, match="layers"):
        jax.eval_shape(lambda m: m(jnp.zeros((1, 12, 12, 3)), layers=layers), abstract_model(TINY))


def test_an_unknown_remat_policy_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model.remat='ful': choose one of none, full, dots, attention"):
        dataclasses.replace(TINY, remat="ful").validate()


def test_learned_positions_are_resampled_bicubically_with_aligned_borders(mesh: MeshFactory) -> None:
    config = dataclasses.replace(TINY, image_size=32)  # 8 x 8 patches
    rows, columns = np.mgrid[:8, :8].reshape(2, 64)
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    table[:, 0], table[:, 1], table[:, 2] = 3.0, rows, columns**2

    @functools.partial(jax.jit, static_argnums=1)
    def resampled(model: ViT, grid: tuple[int, int]) -> jax.Array:
        return model.positions(grid)

    with mesh(2, 2, 2) as m:
        model = random_model(config, m)
        model.position[...] = jax.device_put(table, model.position[...].sharding)
        native, larger, smaller = (np.asarray(resampled(model, grid)) for grid in [(8, 8), (12, 20), (4, 6)])
    np.testing.assert_array_equal(native, table)
    np.testing.assert_allclose(larger[:, 0], 3, rtol=1e-5)
    np.testing.assert_allclose(smaller[:, 0], 3, rtol=1e-5)
    # New centres in the old grid's units. Keys' cubic reproduces parabolas where all four neighbours exist.
    centres = [(np.arange(n) + 0.5) * 8 / n - 0.5 for n in (12, 20)]
    inner = [np.flatnonzero((c >= 1) & (c <= 6)) for c in centres]
    larger = larger.reshape(12, 20, 32)[np.ix_(*inner)]
    expected_rows, expected_columns = np.meshgrid(*(c[i] for c, i in zip(centres, inner, strict=True)), indexing="ij")
    np.testing.assert_allclose(larger[..., 1], expected_rows, rtol=1e-4)
    np.testing.assert_allclose(larger[..., 2], expected_columns**2, rtol=1e-4)


def test_another_resolution_equals_a_model_with_the_resampled_table(mesh: MeshFactory) -> None:
    images = np.random.default_rng(1).normal(size=(8, 20, 20, 3)).astype(np.float32)
    with mesh(2, 2, 2) as m:
        model = random_model(PARALLEL, m)
        logits, table = jax.jit(lambda model, x: (model(x).logits, model.positions((5, 5))))(
            model, jax.device_put(images, NamedSharding(m, BATCH))
        )
        weights = named(model) | {"position": table}
    expected = reference.forward(dataclasses.replace(PARALLEL, image_size=20), weights, images)
    assert_close(logits, expected.logits, "logits")


def test_images_that_patches_do_not_tile_are_refused() -> None:
    with use_abstract_mesh(abstract_mesh((1, 1, 1))), pytest.raises(ValueError, match=r"12x14: sides .* patch size 4"):
        jax.eval_shape(lambda m: m(jnp.zeros((1, 12, 14, 3))), abstract_model(TINY))


def test_stochastic_depth_drops_whole_samples_layer_by_layer_and_keeps_the_mean(mesh: MeshFactory) -> None:
    config = dataclasses.replace(PARALLEL, stochastic_depth=0.5)  # rates 0, 1/4, 1/2
    images, runs = random_images(config, batch=256), []
    for shape in [(1, 1, 1), (2, 2, 2)]:
        with mesh(*shape) as m:
            model, x = random_model(config, m), jax.device_put(images, NamedSharding(m, BATCH))
            stream = jax.jit(lambda model, x, key: model(x, key=key, layers=(0, 1, 2)).layers)
            runs.append([np.asarray(stream(model, x, key)) for key in (None, jax.random.key(0), jax.random.key(1))])
    for one, eight in zip(*runs, strict=True):
        assert_close(eight, one, "the same samples are dropped on any mesh")
    undropped, layers, other = runs[0]
    assert_close(undropped[list(LAYERS), :8], run(mesh, PARALLEL).output.layers, "without a key nothing is dropped")
    np.testing.assert_array_equal(layers[0], undropped[0])
    kept = [np.any(layers[i] != layers[i - 1], axis=(1, 2)) for i in (1, 2)]
    assert 0.3 < np.mean(kept[0] == kept[1]) < 0.7, "layers draw independently"
    assert np.any(np.any(other[1] != other[0], axis=(1, 2)) != kept[0]), "keys draw differently"
    blocks = reference.below({name: np.asarray(leaf) for name, leaf in named(model).items()}, "blocks")
    for i, rate in [(1, 0.25), (2, 0.5)]:
        block = functools.partial(reference.block, config, {name: value[i] for name, value in blocks.items()})
        added = np.stack([block(x) - x for x in layers[i - 1].astype(np.float64)])
        expected = layers[i - 1] + added * kept[i - 1][:, None, None] / (1 - rate)
        assert_close(layers[i], expected, f"layer {i}")
        standard_error = math.sqrt(rate / (1 - rate) / 256)  # of the mean of kept / (1 - rate)
        assert abs(kept[i - 1].mean() / (1 - rate) - 1) < 3 * standard_error


def test_stochastic_depth_of_rate_0_is_none(mesh: MeshFactory) -> None:
    with mesh(1, 1, 1) as m:
        logits = jax.jit(lambda model, x, key: model(x, key=key).logits)(
            random_model(PARALLEL, m), random_images(PARALLEL), jax.random.key(0)
        )
    assert_close(logits, run(mesh, PARALLEL).output.logits, "logits")


def counts(table: dict, name: str) -> tuple[int, int]:
    """Matmul weights in the blocks, and all parameters but the classifier's."""
    with use_abstract_mesh(abstract_mesh((1, 1, 1))):
        sizes = named(abstract_model(ModelConfig(**size(name, table), num_classes=1)))
    matrices = [leaf.size for path, leaf in sizes.items() if path.startswith("blocks") and leaf.ndim == 3]
    return sum(matrices), sum(leaf.size for path, leaf in sizes.items() if not path.startswith("head"))


def test_parameter_counts_are_the_papers() -> None:
    blocks = {name: counts(SIZES, name)[0] for name in SIZES}
    assert blocks.pop("22B") == 21_743_271_936  # [Dehghani 2023] Table 1: 21,743 M
    millions = {name: round(count / 1e6, 1) for name, count in blocks.items()}
    assert millions == {
        "Ti": 5.3, "S": 21.2, "B": 84.9, "L": 302.0, "So400m": 411.1, "H": 629.1, "g": 1009.3, "G": 1840.3, "e": 3802.1
    }  # fmt: skip


def test_ladder_names_are_their_parameter_counts() -> None:
    totals = {name: counts(LADDER, name)[1] for name in LADDER}
    units = {"M": 1e6, "B": 1e9}
    for name, total in totals.items():
        assert total == pytest.approx(float(name[:-1]) * units[name[-1]], rel=0.15), name
        width, _, mlp_dim, num_heads = LADDER[name]
        assert mlp_dim == 4 * width
        assert width / num_heads in ({128} if total > 9e7 else {32, 64})
    assert list(totals.values()) == sorted(totals.values())
    assert totals["0.5M"] < 1_000_000
