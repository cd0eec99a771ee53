"""Validation metrics against scikit-learn and NumPy on the whole set, however it is cut into batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import sklearn.metrics

from vit22b.config import LossConfig
from vit22b.metrics import ClassificationSums, classification_sums

SOFTMAX, SIGMOID = LossConfig(kind="softmax"), LossConfig(kind="sigmoid")
EXAMPLES, CLASSES = 103, 10
RNG = np.random.default_rng(0)
LABELS = RNG.integers(CLASSES, size=EXAMPLES, dtype=np.int32)
LOGITS = (RNG.normal(size=(EXAMPLES, CLASSES)) + 1.5 * np.eye(CLASSES)[LABELS]).astype(np.float32)
compiled = {c.kind: jax.jit(functools.partial(classification_sums, config=c)) for c in (SOFTMAX, SIGMOID)}


def in_batches(logits: np.ndarray, labels: np.ndarray, batch: int, kind: str = "softmax") -> ClassificationSums:
    """The sums of all batches. The last one is filled up with examples that the mask leaves out."""
    missing = -len(labels) % batch
    filler = np.random.default_rng(1).normal(size=(missing, logits.shape[1])).astype(np.float32)
    logits, labels = np.concatenate([logits, 9 * filler]), np.concatenate([labels, np.zeros(missing, np.int32)])
    mask = np.arange(len(labels)) < len(labels) - missing
    parts = [
        compiled[kind](logits[i : i + batch], labels[i : i + batch], mask[i : i + batch].astype(np.float32))
        for i in range(0, len(labels), batch)
    ]
    return functools.reduce(lambda a, b: a + b, parts)


def result(logits, labels, kind: str = "softmax") -> dict[str, float]:
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels, np.int32)
    return in_batches(logits, labels, len(labels), kind).result()


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    error = 0.0
    for i in range(15):
        last = i == 14
        members = (confidence >= i / 15) & ((confidence < (i + 1) / 15) | last)
        if members.any():
            error += members.mean() * abs(confidence[members].mean() - correct[members].mean())
    return error


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("batch", [16, EXAMPLES])  # 16 does not divide 103
def test_metrics_equal_independent_ones_on_the_whole_set(batch: int, kind: str) -> None:
    logits = LOGITS.astype(np.float64) - (1 if kind == "sigmoid" else 0)
    got = in_batches(logits.astype(np.float32), LABELS, batch, kind).result()
    probabilities, targets = np.exp(logits), np.eye(CLASSES)[LABELS]
    if kind == "softmax":
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        loss = sklearn.metrics.log_loss(LABELS, probabilities)
    else:
        probabilities /= 1 + probabilities
        loss = CLASSES * sklearn.metrics.log_loss(targets.ravel(), probabilities.ravel())
    correct = logits.argmax(axis=1) == LABELS
    assert 0.3 < correct.mean() < 0.8
    assert got["examples"] == EXAMPLES
    assert got["top1"] == sklearn.metrics.accuracy_score(LABELS, logits.argmax(axis=1))
    assert got["top5"] == sklearn.metrics.top_k_accuracy_score(LABELS, logits, k=5)
    np.testing.assert_allclose(got["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(got["ece"], calibration_error(probabilities.max(axis=1), correct), rtol=1e-5)


def test_any_split_into_batches_gives_the_same_sums() -> None:
    whole = in_batches(LOGITS, LABELS, EXAMPLES)
    for batch in (1, 16, 50):
        parts = in_batches(LOGITS, LABELS, batch)
        for field in ("count", "top1", "top5", "bin_count", "bin_correct"):
            np.testing.assert_array_equal(getattr(parts, field), getattr(whole, field), err_msg=field)
        for field in ("loss", "bin_confidence"):  # sums of fp32 depend on the order in their last bits
            np.testing.assert_allclose(getattr(parts, field), getattr(whole, field), rtol=1e-6, err_msg=field)


def test_the_loss_is_reported_without_its_regularizers() -> None:
    config = dataclasses.replace(SOFTMAX, label_smoothing=0.3, z_loss=1.0)
    sums = jax.jit(functools.partial(classification_sums, config=config))(LOGITS, LABELS, np.ones(EXAMPLES, np.float32))
    np.testing.assert_allclose(sums.loss, in_batches(LOGITS, LABELS, EXAMPLES).loss, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e4, -3.5])
def test_constant_logits_choose_the_first_classes(value: float) -> None:
    got = result(np.full((20, CLASSES), value), np.arange(20) % CLASSES)
    assert got["top1"] == 1 / CLASSES
    assert got["top5"] == 5 / CLASSES


def test_of_equal_winners_the_first_is_the_choice() -> None:
    logits = np.zeros((4, CLASSES))
    logits[:, [3, 7]] = 2.0
    assert [result(logits[:1], [label])["top1"] for label in (3, 7, 0)] == [1.0, 0.0, 0.0]
    # Of the classes at 0, those with indices 0, 1, 2 complete the first five.
    assert [result(logits[:1], [label])["top5"] for label in (7, 0, 2, 4, 9)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_examples_with_nan_are_wrong() -> None:
    logits, labels = np.tile(10 * np.eye(CLASSES, dtype=np.float32), (2, 1)), np.tile(np.arange(CLASSES), 2)
    assert result(logits, labels)["top1"] == 1.0
    logits[0] = np.nan
    logits[1, 1] = np.nan  # the label's
    got = result(logits, labels)
    assert (got["top1"], got["top5"]) == (0.9, 0.9)
    logits[2, 8] = np.nan  # another's, which may be the winner
    assert result(logits, labels)["top1"] == 0.85


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_confidence_of_one_falls_into_the_last_bin(kind: str) -> None:
    logits = np.where(np.eye(CLASSES), 1e4, -1e4)
    got = result(logits, np.arange(CLASSES), kind)
    assert got == {"loss": 0.0, "top1": 1.0, "top5": 1.0, "ece": 0.0, "examples": CLASSES}


def test_sigmoid_confidence_is_the_winners_own() -> None:
    """Winner at 0, the rest at -10: sigmoid is half sure of what softmax is almost sure of."""
    logits, labels = np.where(np.eye(CLASSES), 0.0, -10.0), np.arange(CLASSES)
    assert result(logits, labels, "sigmoid")["ece"] == pytest.approx(0.5)
    assert result(logits, labels, "softmax")["ece"] == pytest.approx(1 - 1 / (1 + 9 * np.exp(-10)), abs=1e-6)


def two_classes(confidence: float, right: int, wrong: int) -> tuple[list, list]:
    """Class 0 is predicted with that confidence."""
    return [[np.log(confidence / (1 - confidence)), 0.0]] * (right + wrong), [0] * right + [1] * wrong


def test_calibrated_predictions_have_no_calibration_error() -> None:
    groups = [two_classes(0.6, 6, 4), two_classes(0.75, 9, 3), two_classes(0.9, 9, 1)]
    logits, labels = zip(*groups, strict=True)
    assert result(np.concatenate(logits), np.concatenate(labels))["ece"] < 1e-6


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    assert result(*two_classes(0.9, 6, 4))["ece"] == pytest.approx(0.3, rel=1e-5)
    # Errors in two bins do not cancel: 0.3 too sure and 0.2 not sure enough.
    groups = [two_classes(0.9, 6, 4), two_classes(0.6, 8, 2)]
    logits, labels = zip(*groups, strict=True)
    assert result(np.concatenate(logits), np.concatenate(labels))["ece"] == pytest.approx((0.3 + 0.2) / 2, rel=1e-5)
    surely_wrong = np.where(np.eye(CLASSES), 1e4, 0.0)
    assert result(surely_wrong, (np.arange(CLASSES) + 1) % CLASSES)["ece"] == 1.0


def test_with_fewer_than_five_classes_every_label_is_among_the_first_five() -> None:
    got = result([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [0, 0])
    assert (got["top1"], got["top5"]) == (0.5, 1.0)
