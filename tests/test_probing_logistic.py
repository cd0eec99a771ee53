"""Logistic regression against scikit-learn, and its derivatives against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vit22b.errors import RecipeError
from vit22b.probing import logistic
from vit22b.probing.heads import measure
from vit22b.probing.rows import Features

PENALTIES = (0.01, 1.0, 100.0)
CLASSES = 5


def digits():
    data = load_digits()
    return Features({"x": (data.data / 16).astype(np.float32)}, data.target.astype(np.int32), 10)


def random_features(dtype=np.float32, seed=0):
    """Of width 12, in directions that mix the columns, on scales from 3 to 0.1, around 10."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=211).astype(np.int32)
    x = rng.normal(size=(CLASSES, 12))[labels] + 2 * rng.normal(size=(211, 12))
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    return Features({"x": (x * np.logspace(0.5, -1, 12) @ turn + 10).astype(dtype)}, labels, CLASSES)


def fit(features, rows, penalties=PENALTIES, tolerance=1e-9, max_iterations=1000):
    return logistic.fit(features, "x", rows, penalties, tolerance, max_iterations)


def expected(features, rows, c, solver="newton-cholesky", tol=1e-10):
    """scikit-learn's; on features of such scales its Newton method goes nearer to the optimum than its lbfgs."""
    x = features.columns["x"][rows].astype(np.float64)
    return LogisticRegression(C=c, tol=tol, max_iter=10_000, solver=solver).fit(x, features.labels[rows])


def centred(bias):
    bias = np.asarray(bias, np.float64)
    return bias - bias.mean()  # a constant added to all changes nothing


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_heads_are_those_of_scikit_learn(mesh, shape, monkeypatch):
    """With replicas, on 26 rows a device, of which the last are not there, in three chunks that overlap."""
    monkeypatch.setattr(logistic, "CHUNK", 20 * 64)
    features, rows, held_out = digits(), np.arange(606, 0, -3), np.arange(607, 1797)
    with mesh(*shape):
        heads, *_ = fit(features, rows)
        measured = measure(heads, features, held_out)
    for h, c in enumerate(PENALTIES):
        head = expected(features, rows, c, "lbfgs")
        np.testing.assert_allclose(np.asarray(heads.kernel[h]), head.coef_.T, atol=1e-4)
        np.testing.assert_allclose(centred(heads.bias[h]), centred(head.intercept_), atol=3e-4)
        x, labels = features.columns["x"][held_out].astype(np.float64), features.labels[held_out]
        got = measured[h].result()
        assert got["top1"] == head.score(x, labels)
        loss = -head.predict_log_proba(x)[np.arange(len(x)), labels].mean()
        np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_features_of_any_scale_have_their_optimum(mesh, dtype):
    features, rows = random_features(dtype), np.arange(200)
    with mesh():
        heads, *_ = fit(features, rows)
    for h, c in enumerate(PENALTIES):
        head = expected(features, rows, c)
        np.testing.assert_allclose(np.asarray(heads.kernel[h]), head.coef_.T, atol=5e-5)
        np.testing.assert_allclose(centred(heads.bias[h]), centred(head.intercept_), atol=1e-3)


def test_all_products_are_of_full_precision(mesh, monkeypatch):
    """Which a CPU's always are; a GPU's or TPU's only where the program says so."""
    texts, run = [], logistic._fit

    def keep(*arguments):
        texts.append(run.lower(*arguments).as_text())
        return run(*arguments)

    monkeypatch.setattr(logistic, "_fit", keep)
    with mesh():
        fit(random_features(jnp.bfloat16), np.arange(200), max_iterations=1)
    products = [line for line in texts[0].splitlines() if "dot_general" in line]
    assert len(products) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line and "bf16" not in line for line in products)


def test_scales_cost_few_iterations(mesh):
    features, rows = random_features(), np.arange(200)
    with mesh():
        _, iterations, _ = fit(features, rows, tolerance=1e-5)
    for count, c in zip(iterations[:2], PENALTIES, strict=False):
        assert count < expected(features, rows, c, "lbfgs", 1e-5).n_iter_[0] / 10


def test_a_head_is_done_at_the_tolerance_or_the_last_iteration(mesh):
    features, rows = random_features(), np.arange(200)
    with mesh():
        done, stopped = fit(features, rows, tolerance=1e-3), fit(features, rows, max_iterations=4)
    assert (stopped[1] == 4).all()
    assert (stopped[2] > 1e-3).all()
    assert len(set(done[1])) > 1  # each in its time
    assert done[1].max() < 1000
    assert done[2].max() <= 1e-3
    x, hot = features.columns["x"][rows].astype(np.float64), np.eye(CLASSES)[features.labels[rows]]
    for heads, _, derivatives in (done, stopped):
        for h, c in enumerate(PENALTIES):
            kernel, bias = np.asarray(heads.kernel[h], np.float64), np.asarray(heads.bias[h], np.float64)
            error = (scipy.special.softmax(x @ kernel + bias, axis=1) - hot) / len(rows)
            gradient = (x - x.mean(axis=0)).T @ error + kernel / (c * len(rows)), error.sum(axis=0)
            largest = max(np.abs(each).max() for each in gradient)
            np.testing.assert_allclose(derivatives[h], largest, rtol=1e-2)


def test_rounding_ends_the_search(mesh):
    with mesh():
        _, iterations, derivatives = fit(random_features(), np.arange(200), tolerance=0.0, max_iterations=10_000)
    assert derivatives.max() < 1e-5
    assert iterations.max() < 500


def test_a_class_without_rows_is_not_predicted(mesh):
    features = random_features()
    rows = np.flatnonzero(features.labels != 2)[:100]
    with mesh():
        heads, *_ = fit(features, rows, tolerance=1e-7)
    x, others = features.columns["x"].astype(np.float64), [0, 1, 3, 4]
    for h, c in enumerate(PENALTIES):
        probabilities = scipy.special.softmax(x @ np.asarray(heads.kernel[h]) + np.asarray(heads.bias[h]), axis=1)
        assert probabilities[:, 2].max() < 1e-4
        np.testing.assert_allclose(probabilities[:, others], expected(features, rows, c).predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_of_two_classes_with_rows_c_is_scikit_learns(mesh, num_classes):
    features = random_features()
    features = Features(features.columns, features.labels % 2, num_classes)
    with mesh():
        heads, *_ = fit(features, np.arange(200))
        kernel, bias = np.asarray(heads.kernel), np.asarray(heads.bias)
    for h, c in enumerate(PENALTIES):
        head = expected(features, np.arange(200), c)
        np.testing.assert_allclose(kernel[h, :, 1] - kernel[h, :, 0], head.coef_[0], atol=1e-3)
        np.testing.assert_allclose(bias[h, 1] - bias[h, 0], head.intercept_[0], rtol=1e-3)


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_must_be_positive(mesh, c):
    with mesh(), pytest.raises(RecipeError, match=r"--c=\(1.0, .*\): must be positive"):
        fit(random_features(), np.arange(9), (1.0, c))
