"""Heads in closed form and nearest neighbours, against scikit-learn and NumPy."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit22b.errors import RecipeError
from vit22b.probing import closed_form, nearest
from vit22b.probing.closed_form import few_shot, ridge
from vit22b.probing.rows import Features

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]


def random_features(count, width, classes, offset=5.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count).astype(np.int32)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    x = (centres[labels] + rng.normal(size=(count, width)) + offset).astype(dtype)
    return Features({"x": x}, labels, classes)


def assert_ridge_is_that_of_scikit_learn(features, rows, penalties):
    """The coefficients of each class within 1e-5 of their length, and what is predicted for other features."""
    heads = ridge(features, "x", rows, penalties)
    x, y = features.columns["x"][rows].astype(np.float64), features.labels[rows]
    targets = np.where(y[:, None] == np.arange(features.num_classes), 1.0, -1.0)
    others = x + np.random.default_rng(1).normal(size=x.shape)
    assert [each["l2"] for each in heads.settings] == list(penalties)
    for h, l2 in enumerate(penalties):
        expected = Ridge(alpha=l2, solver="svd").fit(x, targets)
        kernel, bias = np.asarray(heads.kernel[h], np.float64), np.asarray(heads.bias[h], np.float64)
        error_C = np.linalg.norm(kernel - expected.coef_.T, axis=0)
        assert (error_C <= 1e-5 * np.linalg.norm(expected.coef_.T, axis=0)).all()  # both are 0 without images
        np.testing.assert_allclose(others @ kernel + bias, expected.predict(others), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", MESHES)
def test_ridge_is_that_of_scikit_learn(mesh, monkeypatch, shape, dtype):
    """With an offset of a hundred deviations, many classes, one of them without images, and several batches."""
    monkeypatch.setattr(closed_form, "BATCH_SIZE", 200)
    features = random_features(2403, 12, 40, 100.0 if dtype == np.float32 else 5.0, dtype=dtype)
    features.labels[features.labels == 7] = 8
    with mesh(*shape):
        assert_ridge_is_that_of_scikit_learn(features, np.arange(2400, 3, -1), (1e-3, 1.0, 100.0))


@pytest.mark.parametrize("count", [30, 300])  # fewer and more than the features
def test_ridge_gives_no_weight_to_where_features_do_not_vary(mesh, count):
    """Their moments there are rounding errors and the penalty is no larger: these must not be taken for variance."""
    features = random_features(count, 40, 3)
    x = np.round(features.columns["x"] * 1024) / 1024  # so that the sum is exact
    x = np.concatenate([x, x[:, :5], x[:, 5:10] + x[:, 10:15], np.full((count, 1), 7.3, np.float32)], axis=1)
    with mesh(data=8):
        assert_ridge_is_that_of_scikit_learn(Features({"x": x}, features.labels, 3), np.arange(count), (1e-6, 1e-2))


def test_moments_of_thousands_of_batches_are_as_exact_as_those_of_one(mesh):
    features = random_features(8, 3, 2, offset=0.0)
    x, labels, mask = features.columns["x"], features.labels, np.ones(8, np.float32)
    with mesh():
        zero = jnp.zeros(3)
        total, excess = one, _ = closed_form._add(jnp.zeros((3, 5)), jnp.zeros((3, 5)), x, labels, mask, zero)
        one = np.asarray(one, np.float64)
        for _ in range(2999):
            total, excess = closed_form._add(total, excess, x, labels, mask, zero)
    np.testing.assert_allclose(total, 3000 * one, rtol=1e-7)


@pytest.mark.parametrize("l2", [0.0, -1.0])
def test_penalties_that_are_not_positive_are_refused(mesh, l2):
    with mesh(), pytest.raises(RecipeError, match=f"--l2={l2}: must be positive"):
        ridge(random_features(9, 3, 2), "x", np.arange(9), (1.0, l2))


@pytest.mark.parametrize("width", [4, 40])  # fewer and more than the 15 examples
def test_few_shots_are_regressed_on_standardised_features(mesh, width):
    features, rows = random_features(90, width, 5), np.arange(80)
    with mesh(data=8):
        head = few_shot(features, "x", rows, 3, seed=1)
        other = few_shot(features, "x", rows, 3, seed=2)
    assert not np.allclose(head.kernel, other.kernel)
    rng = np.random.default_rng(1)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(features.labels[:80] == c))[:3] for c in range(5)])
    x = features.columns["x"][chosen].astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-5
    # Least squares with rows of sqrt(l2) that pull every weight to 0: the same minimum, by another way.
    design = np.column_stack([(x - mean) / deviation, np.full(15, 100.0)])
    targets = np.where(features.labels[chosen][:, None] == np.arange(5), 1.0, -1.0)
    stacked = np.concatenate([design, np.sqrt(1024.0) * np.eye(width + 1)])
    weights = np.linalg.lstsq(stacked, np.concatenate([targets, np.zeros((width + 1, 5))]), rcond=None)[0]
    new = features.columns["x"][80:].astype(np.float64)
    expected = (new - mean) / deviation @ weights[:-1] + 100 * weights[-1]
    np.testing.assert_allclose(new @ np.asarray(head.kernel[0]) + np.asarray(head.bias[0]), expected, atol=1e-6)


def test_a_class_with_fewer_images_than_shots_gives_all(mesh):
    """Five shots of classes with 3 and 9 images: the head is that of the 3, and of one choice of 5 among the 9."""
    features = Features(random_features(12, 3, 2).columns, np.array([0] * 3 + [1] * 9, np.int32), 2)
    with mesh():
        kernel = np.asarray(few_shot(features, "x", np.arange(12), 5, seed=0).kernel)
        distances = []
        for drawn in itertools.combinations(range(3, 12), 5):
            head = few_shot(features, "x", np.array([0, 1, 2, *drawn]), 9, seed=1)  # all of these rows
            distances.append(np.abs(np.asarray(head.kernel) - kernel).max())
    least, second = sorted(distances)[:2]
    assert least < 1e-7 < second


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", MESHES)
def test_votes_are_those_of_the_nearest(mesh, monkeypatch, shape, dtype):
    """Nothing divides the 197 rows: not the devices, nor their blocks, nor the groups in these.

    All similarities are negative, so that rows of zeros would win.
    """
    monkeypatch.setattr(nearest, "BLOCK", 10)
    monkeypatch.setattr(nearest, "QUERIES", 16)
    train, queries = random_features(199, 6, 4, 4.0, 0, dtype), random_features(37, 6, 4, -4.0, 1, dtype)
    rows, asked, neighbours = np.arange(1, 198), np.arange(36, 1, -1), (1, 5, 20, 197)
    with mesh(*shape):
        found = nearest.votes(train, "x", rows, queries, asked, neighbours, 0.07)
    assert found.shape == (4, 35, 4)
    assert found.dtype == np.float32

    similarity = unit(queries.columns["x"][asked]) @ unit(train.columns["x"][rows]).T
    assert similarity.max() < 0
    order = np.argsort(-similarity, axis=1)
    for k, shares in zip(neighbours, found, strict=True):
        expected = np.zeros((len(asked), 4))
        for i, near in enumerate(order[:, :k]):
            np.add.at(expected[i], train.labels[rows][near], np.exp(similarity[i, near] / 0.07))
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(shares, expected, atol=1e-5)
        np.testing.assert_array_equal(shares.argmax(axis=1), expected.argmax(axis=1))


def test_of_equally_near_rows_the_first_vote_at_any_temperature(mesh, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 10)
    same = Features({"x": np.ones((99, 4), np.float32)}, np.arange(99, dtype=np.int32), 99)
    for devices in (1, 8):
        with mesh(data=devices):
            (shares,) = nearest.votes(same, "x", np.arange(98, -1, -1), same, np.arange(1), (3,), 1e-4)
        np.testing.assert_array_equal(np.flatnonzero(shares[0]), [96, 97, 98])
        np.testing.assert_allclose(shares[0, 96:], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("count", [5, 64, 203])
@pytest.mark.parametrize("k", [1, 5])
def test_the_highest_of_groups_are_those_of_all(count, k):
    """Also where numbers are equal, and where they are infinite as those of rows that fill up."""
    x = np.random.default_rng(0).integers(0, 12, (50, count)).astype(np.float32)
    x[x == 0] = -np.inf
    for found, expected in zip(nearest.top_k(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_more_neighbours_than_images_are_refused(mesh):
    features = random_features(9, 3, 2)
    with mesh(), pytest.raises(RecipeError, match="--neighbours=10: there are 9"):
        nearest.votes(features, "x", np.arange(9), features, np.arange(9), (1, 10), 0.07)
