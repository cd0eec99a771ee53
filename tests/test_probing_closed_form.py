"""Heads in closed form and nearest neighbours, against scikit-learn and NumPy."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit22b.config import RecipeError
from vit22b.probing import nearest
from vit22b.probing.closed_form import few_shot, ridge
from vit22b.probing.rows import Features


def random_features(count, width, classes, offset=5.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count).astype(np.int32)
    centres = rng.normal(size=(classes, width))
    x = (centres[labels] + rng.normal(size=(count, width)) + offset).astype(np.float32)
    return Features({"x": x}, labels, classes)


@pytest.mark.parametrize("devices", [1, 8])
def test_ridge_is_that_of_scikit_learn(mesh, devices):
    features, rows = random_features(203, 12, 5), np.arange(200, 3, -1)
    with mesh(data=devices):
        heads = ridge(features, "x", rows, (1e-3, 1.0, 100.0))
    x, y = features.columns["x"][rows].astype(np.float64), features.labels[rows]
    targets = np.where(y[:, None] == np.arange(5), 1.0, -1.0)
    for h, l2 in enumerate((1e-3, 1.0, 100.0)):
        expected = Ridge(alpha=l2).fit(x, targets)
        np.testing.assert_allclose(np.asarray(heads.kernel[h]), expected.coef_.T, atol=1e-5)
        np.testing.assert_allclose(np.asarray(heads.bias[h]), expected.intercept_, atol=1e-4)


def test_ridge_takes_features_that_depend_on_one_another(mesh):
    features = random_features(60, 6, 3)
    twice = Features({"x": np.concatenate([features.columns["x"]] * 2, axis=1)}, features.labels, 3)
    with mesh():
        kernel = np.asarray(ridge(twice, "x", np.arange(60), (1.0,)).kernel[0])
    np.testing.assert_allclose(kernel[:6], kernel[6:], atol=1e-5)  # the least weights share evenly
    assert np.isfinite(kernel).all()


@pytest.mark.parametrize("width", [4, 40])  # fewer and more than the 15 examples
def test_few_shots_are_regressed_on_standardised_features(mesh, width):
    features, rows = random_features(90, width, 5), np.arange(80)
    with mesh():
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
    np.testing.assert_allclose(new @ np.asarray(head.kernel[0]) + np.asarray(head.bias[0]), expected, atol=1e-4)


def test_more_shots_than_a_class_has_are_refused(mesh):
    features = Features({"x": np.eye(5, dtype=np.float32)}, np.array([0, 0, 0, 1, 1], np.int32), 2)
    with mesh(), pytest.raises(RecipeError, match="--shots=3: class 1 has 2 images"):
        few_shot(features, "x", np.arange(5), 3, seed=0)


@pytest.mark.parametrize("devices", [1, 8])
def test_votes_are_those_of_the_nearest(mesh, devices, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 10)
    monkeypatch.setattr(nearest, "QUERIES", 16)
    train, queries = random_features(101, 6, 4, offset=0.0), random_features(37, 6, 4, offset=0.0, seed=1)
    rows, asked, neighbours = np.arange(1, 100), np.arange(36, 1, -1), (1, 5, 20)
    with mesh(data=devices):
        found = nearest.votes(train, "x", rows, queries, asked, neighbours, 0.07)

    def unit(x):
        x = x.astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    similarity = unit(queries.columns["x"][asked]) @ unit(train.columns["x"][rows]).T
    order = np.argsort(-similarity, axis=1)
    for k, shares in zip(neighbours, found, strict=True):
        expected = np.zeros((len(asked), 4))
        for i, near in enumerate(order[:, :k]):
            np.add.at(expected[i], train.labels[rows][near], np.exp(similarity[i, near] / 0.07))
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(shares, expected, atol=1e-5)


def test_more_neighbours_than_images_are_refused(mesh):
    features = random_features(9, 3, 2)
    with mesh(), pytest.raises(RecipeError, match="--neighbours=10: there are 9"):
        nearest.votes(features, "x", np.arange(9), features, np.arange(9), (1, 10), 0.07)
