"""Normalization, mixup and cutmix: what is mixed, by how much, and that no mesh changes it."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
import scipy.special
from conftest import MeshFactory
from jax.sharding import NamedSharding

from vit22b.config import DataConfig
from vit22b.mix import mix, normalize
from vit22b.sharding import BATCH

BATCH_SIZE = 64
MIXUP, CUTMIX, BOTH = (1.0, 0.0), (0.0, 1.0), (0.8, 0.8)


def data_config(mixup: float = 0.0, cutmix: float = 0.0, **changes) -> DataConfig:
    return DataConfig(train="synthetic", validation="synthetic", mixup=mixup, cutmix=cutmix, **changes)


class Mixed(NamedTuple):
    images: np.ndarray
    targets: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """What each example keeps of its own target."""
        return np.einsum("bb->b", self.targets)


@functools.cache
def compiled(config: tuple[float, float]):
    return jax.jit(functools.partial(mix, config=data_config(*config)))


def mixed(
    mesh: MeshFactory, config: tuple[float, float], seed: int = 0, shape: tuple[int, int, int] = (1, 1, 1)
) -> Mixed:
    """A batch where example b is an image of colour b, all over, and of class b."""
    colours, targets = np.arange(BATCH_SIZE, dtype=np.float32), np.eye(BATCH_SIZE, dtype=np.float32)
    images = np.tile(colours[:, None, None, None], (1, 12, 12, 3))
    with mesh(*shape) as m:
        inputs = jax.device_put((images, targets), NamedSharding(m, BATCH))
        outputs = compiled(config)(*inputs, jax.random.key(seed))
        for before, after in zip(inputs, outputs, strict=True):
            assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
        return Mixed(*(np.asarray(x) for x in outputs))


def many_shares(mesh: MeshFactory, config: tuple[float, float]) -> np.ndarray:
    """What the first of each pair keeps, for many pairs."""
    return np.concatenate([mixed(mesh, config, seed).shares[::2] for seed in range(100)])


def test_normalization_equals_the_formula() -> None:
    images = np.random.default_rng(0).integers(256, size=(4, 5, 5, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = normalize(jax.numpy.array(images), data_config(mean=mean, std=std))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (images / 255.0 - mean) / std, rtol=0, atol=2e-6)


def test_off_returns_the_very_input() -> None:
    images, targets = jax.numpy.ones((4, 2, 2, 3)), jax.numpy.eye(4)
    out = mix(images, targets, jax.random.key(0), data_config())
    assert out[0] is images
    assert out[1] is targets


OWN = np.arange(BATCH_SIZE)
NEIGHBOUR = OWN ^ 1  # 0 with 1, 2 with 3, ...


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
def test_targets_are_those_of_neighbours_and_sum_to_one(config: tuple[float, float], mesh: MeshFactory) -> None:
    for seed in range(4):
        result = mixed(mesh, config, seed)
        expected = np.zeros((BATCH_SIZE, BATCH_SIZE), np.float32)
        expected[OWN, OWN], expected[OWN, NEIGHBOUR] = result.shares, 1 - result.shares
        np.testing.assert_allclose(result.targets, expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(result.shares, result.shares[NEIGHBOUR])
        assert len(np.unique(result.shares)) > BATCH_SIZE / 4  # each pair draws its own


def test_mixup_blends_every_pixel_as_the_targets_and_keeps_the_larger_part(mesh: MeshFactory) -> None:
    images, shares = (result := mixed(mesh, MIXUP)).images, result.shares
    blended = shares * OWN + (1 - shares) * NEIGHBOUR
    np.testing.assert_allclose(images, np.broadcast_to(blended[:, None, None, None], images.shape), rtol=1e-5)
    assert shares.min() >= 0.5
    assert shares.max() <= 1


def test_cutmix_pastes_one_square_whose_part_of_the_pixels_is_the_targets(mesh: MeshFactory) -> None:
    result = mixed(mesh, CUTMIX)
    for image, own, neighbour, share in zip(result.images, OWN, NEIGHBOUR, result.shares, strict=True):
        pasted = image == neighbour
        np.testing.assert_array_equal(image, np.where(pasted, neighbour, own))
        np.testing.assert_allclose(1 - pasted.mean(), share, rtol=0, atol=1e-6)
        rows, columns = pasted.any(axis=(1, 2)), pasted.any(axis=(0, 2))
        np.testing.assert_array_equal(pasted, np.broadcast_to((rows[:, None] & columns)[..., None], pasted.shape))
        for line in (rows, columns):  # without gaps
            assert (np.diff(np.flatnonzero(line)) == 1).all()
        # A side covers as many pixels in rows as in columns, give or take one, unless the border clips it.
        assert abs(int(rows.sum()) - int(columns.sum())) <= 1 or is_clipped(rows) or is_clipped(columns)


def is_clipped(line: np.ndarray) -> bool:
    return bool(line[0] or line[-1])


def clipped_area(alpha: float) -> float:
    """Mean area of a box with side sqrt(1 - Beta(a, a)) about a uniform point of the unit square, clipped to it."""
    rng = np.random.default_rng(0)
    half = np.sqrt(1 - rng.beta(alpha, alpha, size=1_000_000)) / 2
    sides = [np.minimum(c + half, 1) - np.maximum(c - half, 0) for c in rng.uniform(size=(2, half.size))]
    return float((sides[0] * sides[1]).mean())


def assert_mean(values: np.ndarray, mean: float) -> None:
    """Within four standard errors."""
    np.testing.assert_allclose(values.mean(), mean, rtol=0, atol=4 * values.std() / math.sqrt(values.size))


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_mixup_ratios_have_the_mean_of_their_distribution(alpha: float, mesh: MeshFactory) -> None:
    """E max(r, 1 - r) = P(Beta(a + 1, a) > 1/2) for r ~ Beta(a, a); 3/4 for a = 1."""
    mean = 1 - scipy.special.betainc(alpha + 1, alpha, 0.5)
    assert alpha != 1.0 or mean == pytest.approx(0.75)
    assert_mean(many_shares(mesh, (alpha, 0.0)), mean)


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_cutmix_boxes_have_the_mean_area_of_clipped_squares(alpha: float, mesh: MeshFactory) -> None:
    """For a = 1 the square u of the side is uniform, and E (sqrt(u) - u/4)^2 = 1/2 - 1/5 + 1/48."""
    mean = clipped_area(alpha)
    assert alpha != 1.0 or mean == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=1e-3)
    assert_mean(1 - many_shares(mesh, (0.0, alpha)), mean)


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
def test_a_batch_is_mixed_bitwise_the_same_on_eight_devices(shape: tuple[int, int, int], mesh: MeshFactory) -> None:
    for seed in range(6):
        one, eight = mixed(mesh, BOTH, seed), mixed(mesh, BOTH, seed, shape=shape)
        np.testing.assert_array_equal(one.images, eight.images)
        np.testing.assert_array_equal(one.targets, eight.targets)


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
def test_a_key_decides_the_mix(config: tuple[float, float], mesh: MeshFactory) -> None:
    first, again, other = (mixed(mesh, config, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert (first.shares != other.shares).mean() > 0.9


def test_with_both_on_half_of_the_batches_are_cut_and_half_blended(mesh: MeshFactory) -> None:
    cut = []
    for seed in range(200):
        images = mixed(mesh, BOTH, seed).images.reshape(BATCH_SIZE, -1)
        is_cut = ((images == OWN[:, None]) | (images == NEIGHBOUR[:, None])).all()
        assert is_cut or np.ptp(images, axis=1).max() == 0  # the whole batch is one or the other
        cut.append(is_cut)
    np.testing.assert_allclose(np.mean(cut), 0.5, rtol=0, atol=4 * 0.5 / math.sqrt(200))  # four standard errors
