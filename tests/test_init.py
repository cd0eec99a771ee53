"""Initial weights against the papers' formulas."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import reference
from conftest import MeshFactory, named

from vit22b import init
from vit22b.model import ViT
from vit22b.model_config import ModelConfig

CONFIG = ModelConfig(
    width=64, depth=2, mlp_dim=256, num_heads=4, num_classes=8, image_size=32, patch_size=4, init="mimetic",
    head_bias=-10.0, layer_scale=0.125, norm_bias=True, qkv_bias=True, proj_bias=True, num_registers=4,
)  # fmt: skip
PLAIN = {"block": "sequential", "qk_norm": "none"}


@functools.cache
def initial(mesh: MeshFactory, config: ModelConfig, shape: tuple[int, int, int] = (1, 1, 1)) -> dict[str, np.ndarray]:
    """All parameters of a model created on a mesh of that shape."""
    with mesh(*shape):
        model = jax.jit(lambda key: ViT(config, key))(jax.random.key(7))
        return {name: np.asarray(leaf) for name, leaf in named(model).items()}


def by_head(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """(D, D) to (N, D, H)."""
    return kernel.reshape(len(kernel), num_heads, -1).swapaxes(0, 1)


@functools.cache
def query_key(width: int, num_heads: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    q, k = jax.jit(init.mimetic_query_key, static_argnums=(1, 2))(jax.random.key(seed), width, num_heads)
    return by_head(np.asarray(q), num_heads), by_head(np.asarray(k), num_heads)


def test_each_heads_query_key_product_is_the_best_approximation_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    width, num_heads, head_dim = 32, 4, 8
    z = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32) / math.sqrt(width)
    monkeypatch.setattr(init, "_noise", lambda key, width: jax.numpy.asarray(z))
    u, s, vt = np.linalg.svd(0.7 * z.astype(np.float64) + 0.7 * np.eye(width))
    best = (u[:, :head_dim] * s[:head_dim]) @ vt[:head_dim]  # Eckart-Young
    query, key = query_key.__wrapped__(width, num_heads)
    for q, k in zip(query, key, strict=True):
        np.testing.assert_allclose(q @ k.T, best, atol=1e-5)
        for factor in (q, k):  # both carry the square root of the singular values
            np.testing.assert_allclose(factor.T @ factor, np.diag(s[:head_dim]), atol=1e-5)


def assert_noise_around_identity(products: np.ndarray, noise: float, identity: float) -> None:
    """Matrices (M, D, D) have N(0, noise^2 / D) entries, around `identity` on the diagonal; to 4 standard errors."""
    width = products.shape[-1]
    std = noise / math.sqrt(width)
    on, off = products[:, np.eye(width, dtype=bool)], products[:, ~np.eye(width, dtype=bool)]
    assert abs(on.mean() - identity) < 4 * std / math.sqrt(on.size)
    assert abs(off.mean()) < 4 * std / math.sqrt(off.size)
    assert abs(off.std() / std - 1) < 4 / math.sqrt(2 * off.size)
    scale = math.sqrt(identity**2 + noise**2)  # of the singular values: root mean square
    singular = np.linalg.svd(products, compute_uv=False)
    assert np.sqrt((singular**2).mean()) == pytest.approx(scale, rel=0.1)


def test_mimetic_query_key_of_full_rank_is_noise_and_identity_of_weight_0_7() -> None:
    q, k = query_key(64, num_heads=1)
    assert_noise_around_identity(q @ k.swapaxes(1, 2), noise=0.7, identity=0.7)


def test_mimetic_heads_draw_their_own_noise_with_the_largest_singular_values() -> None:
    q, k = query_key(64, num_heads=4)
    products = q @ k.swapaxes(1, 2)
    diagonals = np.trace(products, axis1=1, axis2=2) / 64
    full = query_key(64, num_heads=1)
    largest = np.linalg.svd(full[0] @ full[1].swapaxes(1, 2), compute_uv=False)[0, :16]
    for i in range(4):
        singular = np.linalg.svd(products[i], compute_uv=False)
        np.testing.assert_allclose(singular[:16], largest, rtol=0.15)  # another draw's of the same size
        assert singular[16] < 1e-5
        assert 0 < diagonals[i] < 0.7  # a part of the identity
        for j in range(i):
            assert np.abs(products[i] - products[j]).max() > 0.1


def test_mimetic_value_out_in_the_model_is_noise_and_minus_identity_of_weight_0_4(mesh: MeshFactory) -> None:
    w = reference.below(initial(mesh, CONFIG), "blocks/attention")
    products = w["value"] @ w["out"]
    assert_noise_around_identity(products, noise=0.4, identity=-0.4)
    assert np.abs(products[0] - products[1]).max() > 0.1  # layers draw their own


def test_mimetic_kernels_do_not_depend_on_block_fusion_or_qk_norm(mesh: MeshFactory) -> None:
    one, other = initial(mesh, CONFIG), initial(mesh, dataclasses.replace(CONFIG, **PLAIN))
    for name in ("query", "key", "value", "out"):
        path = f"blocks/attention/{name}"
        np.testing.assert_array_equal(one[path], other[path])


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["QK-norm", "no QK-norm"])
def test_mimetic_heads_attend_to_where_they_are_and_near_it(changes: dict, mesh: MeshFactory) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    blocks = reference.below(initial(mesh, config), "blocks")
    places = np.array([(row, column) for row in range(8) for column in range(8)])
    distance = np.abs(places[:, None] - places).sum(axis=2)
    for layer in range(config.depth):
        w = {name: value[layer] for name, value in blocks.items()}
        x = np.stack([reference.sincos(config.width, *place) for place in places])
        x = reference.norm(config, reference.below(w, "norm"), x)
        weights = reference.attention_weights(config, reference.below(w, "attention"), x, x, config.qk_norm)
        here, beside, far = (weights[:, distance == d].mean(axis=1) for d in (0, 1, 7))
        assert np.all((here > beside) & (beside > 1.2 / 64) & (far < 1 / 64)), layer  # in every head


TRUNCATED = 0.87962566  # standard deviation of a standard normal cut at 2


def assert_bounded(value: np.ndarray, bound: float, std: float) -> None:
    """No value beyond the bound, some of many close to it, and the standard deviation to 5 %."""
    assert 0.97 * bound < np.abs(value).max() <= bound
    assert value.std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("kind", ["xavier", "truncated_normal", "mimetic"])
def test_every_parameter_starts_as_documented(kind: str, mesh: MeshFactory) -> None:
    w = dict(initial(mesh, dataclasses.replace(CONFIG, init=kind)))
    assert_bounded(w.pop("patch_kernel"), 2 / math.sqrt(48), TRUNCATED / math.sqrt(48))  # 48 = 3 x 4 x 4
    assert w.pop("position").std() == pytest.approx(1 / 8, rel=0.05)
    assert w.pop("prefix").std() == pytest.approx(0.02, rel=0.2)  # of 256 values
    probe = w.pop("map_head/probe")
    assert 0.8 * math.sqrt(6 / 65) < np.abs(probe).max() <= math.sqrt(6 / 65)
    for branch, names in [("attention", ("query", "key", "value", "out")), ("mlp", ("up", "out"))]:
        for name in names:
            kernels = [w.pop(f"{module}/{branch}/{name}") for module in ("blocks", "map_head")]
            if kind == "truncated_normal":
                assert_bounded(kernels[0], 0.04, 0.02 * TRUNCATED)
                assert_bounded(kernels[1], 0.04, 0.02 * TRUNCATED)
            elif kind == "xavier" or branch == "mlp":
                limit = math.sqrt(6 / (64 + 64 if branch == "attention" else 64 + 256))
                assert_bounded(kernels[0], limit, limit / math.sqrt(3))
                assert_bounded(kernels[1], limit, limit / math.sqrt(3))
    constants = {"head_kernel": 0.0, "head_bias": -10.0, "blocks/attention/scale": 0.125, "blocks/mlp/scale": 0.125}
    for name, value in w.items():
        np.testing.assert_array_equal(value, constants.get(name, name.endswith("norm/scale")), name)


@pytest.mark.parametrize("kind", ["xavier", "truncated_normal", "mimetic"])
def test_eight_devices_start_bitwise_as_one(kind: str, mesh: MeshFactory) -> None:
    config = dataclasses.replace(CONFIG, init=kind)
    one, eight = initial(mesh, config), initial(mesh, config, (2, 2, 2))
    for name, value in one.items():
        np.testing.assert_array_equal(eight[name], value, name)
