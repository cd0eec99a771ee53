"""The error's parts where each is forced to a known value, or found by scikit-learn; who is held back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vit22b.errors import RecipeError
from vit22b.probing.decompose import decompose, split
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features

PARTS = ("approximation", "usability", "probe_generalization", "encoder_generalization", "total")


def features(x, labels, num_classes):
    return Features({"x": np.asarray(x, np.float32)}, np.asarray(labels, np.int32), num_classes)


def as_head(kernel_DC, bias_C):
    return Heads("x", [{}], jnp.asarray(kernel_DC[None], jnp.float32), jnp.asarray(bias_C[None], jnp.float32))


def least_squares(train, bias=True):
    """`fit`: the solution of smallest norm for targets 0 and 1."""

    def fit(rows):
        x = np.pad(np.float64(train.columns["x"][rows]), ((0, 0), (0, 1)), constant_values=bias)
        kernel = np.linalg.lstsq(x, np.eye(train.num_classes)[train.labels[rows]], rcond=None)[0]
        return as_head(kernel[:-1], kernel[-1])

    return fit


def parts(mesh, train, test, fit=None, seed=0, approximation=None):
    with mesh(data=4):
        fit = fit or least_squares(train)
        found = decompose(fit(np.arange(len(train))), fit, train, test, seed, approximation).to_json()
    assert tuple(found) == PARTS
    return found


def test_an_encoder_that_memorises_fails_in_encoder_generalization_alone(mesh):
    """Its features are the labels of images it was trained on, and the next class on others."""
    labels, test_labels = np.arange(200) % 4, np.arange(40) % 4
    train, test = features(np.eye(4)[labels], labels, 4), features(np.eye(4)[(test_labels + 1) % 4], test_labels, 4)
    assert list(parts(mesh, train, test).values()) == [None, 0, 0, 1, 1]


def test_more_dimensions_than_rows_fail_in_probe_generalization_alone(mesh):
    """Each training image has a dimension of its own: whatever its label, it is fitted, and nothing follows from it.

    A row that the probe has not seen has equal logits, which choose class 0: right for a quarter of all.
    """
    labels = np.random.default_rng(0).permutation(np.arange(100) % 4)
    train, test = features(np.eye(100, 110), labels, 4), features(np.zeros((20, 110)), np.arange(20) % 4, 4)
    found = parts(mesh, train, test, least_squares(train, bias=False))
    assert list(found.values()) == [None, 0, 0.75, 0, 0.75]


def exclusive_or(rows):
    """Corners of a square: 70 % of the rows on one diagonal, label 0, and 30 % on the other."""
    corners = np.array([[1, 1], [-1, -1]] * 7 + [[1, -1], [-1, 1]] * 3)
    x = np.tile(corners, (rows // 20, 1))
    return x, (x[:, 0] != x[:, 1]).astype(int)


def test_labels_that_no_line_separates_fail_in_usability_alone(mesh):
    """Of two diagonals no line beats the larger one's share; with the product as a feature a line separates them."""
    x, labels = exclusive_or(400)
    x_test, test_labels = exclusive_or(80)
    found = parts(mesh, features(x, labels, 2), features(x_test, test_labels, 2))
    np.testing.assert_allclose(list(found.values())[1:], [0.3, 0, 0, 0.3], atol=1e-12)
    x, x_test = (np.c_[x, x[:, 0] * x[:, 1]] for x in (x, x_test))
    assert list(parts(mesh, features(x, labels, 2), features(x_test, test_labels, 2)).values())[1:] == [0, 0, 0, 0]


def test_a_supervised_model_takes_its_training_error_from_usability(mesh):
    x, labels = exclusive_or(400)
    train = features(x, labels, 2)
    found = parts(mesh, train, train, approximation=0.125)
    np.testing.assert_allclose(list(found.values()), [0.125, 0.175, 0, 0, 0.3], atol=1e-12)


@pytest.mark.parametrize("approximation", [None, 0.01])
def test_parts_are_those_of_scikit_learns_errors_and_add_up_to_the_total(mesh, approximation):
    rng = np.random.default_rng(3)
    labels, test_labels = rng.integers(5, size=331), rng.integers(5, size=53)
    x = 1.5 * np.eye(5, 40)[labels] + rng.normal(size=(331, 40))
    x_test = 1.2 * np.eye(5, 40)[test_labels] + rng.normal(size=(53, 40))
    train, test = features(x, labels, 5), features(x_test, test_labels, 5)
    kept, held_back = split(train.labels, 53, seed=7)
    whole, partial = (LogisticRegression().fit(x[rows], labels[rows]) for rows in (slice(None), kept))
    fitted, unseen = 1 - whole.score(x, labels), 1 - partial.score(x[held_back], labels[held_back])
    total = 1 - whole.score(x_test, test_labels)

    def fit(rows):
        model = LogisticRegression().fit(x[rows], labels[rows])
        return as_head(model.coef_.T, model.intercept_)

    with mesh(data=4):
        found = decompose(fit(np.arange(331)), fit, train, test, 7, approximation)
    expected = [approximation, fitted - (approximation or 0), unseen - fitted, total - unseen, total]
    assert min(abs(part) for part in expected if part is not None) > 0  # a test of each
    for name, value, right in zip(PARTS, found.to_json().values(), expected, strict=True):
        assert value == (None if right is None else pytest.approx(right, abs=1e-12)), name
    assert sum(value or 0 for name, value in found.to_json().items() if name != "total") == pytest.approx(
        total, abs=1e-12
    )
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_a_probe_is_measured_on_rows_held_back_that_it_was_not_trained_on(mesh):
    """The probe knows its own rows by heart, and nothing else: it never is right about a row held back."""
    labels = np.arange(100) % 2
    train, test = features(np.eye(100), labels, 2), features(np.zeros((10, 100)), np.ones(10), 2)
    trained_on = []

    def fit(rows):
        trained_on.append(rows)
        kernel = np.stack([labels, 1 - labels], axis=1).astype(float)  # wrong about every row,
        kernel[rows] *= -1  # but about these
        return as_head(kernel, np.zeros(2))

    assert list(parts(mesh, train, test, fit, seed=5).values())[1:] == [0, 1, 0, 1]
    kept, held_back = split(train.labels, 10, seed=5)
    np.testing.assert_array_equal(trained_on[1], kept)  # after the head of all rows
    assert len(held_back) == 10


SKEWED = np.random.default_rng(1).permutation(np.repeat(np.arange(6), [1, 2, 17, 30, 50, 203]))


@pytest.mark.parametrize(("num_test", "size"), [(1, 1), (7, 7), (40, 40), (60, 60), (61, 60), (5000, 60)])
def test_every_class_gives_its_share_of_the_rows_held_back(num_test, size):
    for seed in range(5):
        kept, held_back = split(SKEWED, num_test, seed)
        assert len(held_back) == size
        np.testing.assert_array_equal(np.sort(np.r_[kept, held_back]), np.arange(303))  # disjoint, and all
        share = np.bincount(SKEWED) * size / 303
        counts = np.bincount(SKEWED[held_back], minlength=6)
        assert np.all((counts == np.floor(share)) | (counts == np.ceil(share)))


def test_the_same_seed_holds_back_the_same_rows():
    (kept, held_back), (kept_again, again) = split(SKEWED, 40, 3), split(SKEWED.copy(), 40, 3)
    np.testing.assert_array_equal(kept, kept_again)
    np.testing.assert_array_equal(held_back, again)
    assert not np.array_equal(held_back, split(SKEWED, 40, 4)[1])


def test_every_row_is_as_likely_to_be_held_back():
    labels, draws = np.repeat([0, 1, 2], [3, 20, 12]), 4000
    counts = sum(np.bincount(split(labels, 6, seed)[1], minlength=35) for seed in range(draws))
    chance = 6 / 35
    deviation = np.sqrt(chance * (1 - chance) / draws)
    assert np.abs(counts / draws - chance).max() < 4.5 * deviation


def test_what_cannot_be_decomposed_is_told():
    with pytest.raises(RecipeError, match="--decompose=true: needs 5 training images or more, not 4"):
        split(np.zeros(4, int), 10, 0)
