"""Losses against their formulas in NumPy float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit22b.config import LossConfig
from vit22b.losses import classification_loss

CLASSES = 7
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(5, CLASSES))).astype(np.float32)
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[[0, 3, 6, 3, 2]]
MIXED = (0.75 * ONE_HOT + 0.25 * ONE_HOT[::-1]).astype(np.float32)
MULTI_LABEL = RNG.integers(2, size=(5, CLASSES)).astype(np.float32)
CONFIGS = {
    "softmax": LossConfig(kind="softmax"),
    "softmax-smooth": LossConfig(kind="softmax", label_smoothing=0.1),
    "softmax-z": LossConfig(kind="softmax", z_loss=1e-2),
    "softmax-smooth-z": LossConfig(kind="softmax", label_smoothing=0.3, z_loss=1e-4),
    "sigmoid": LossConfig(kind="sigmoid"),
    "sigmoid-smooth": LossConfig(kind="sigmoid", label_smoothing=0.1),
}


def by_hand(logits: np.ndarray, targets: np.ndarray, config: LossConfig) -> np.ndarray:
    x, t = logits.astype(np.float64), targets.astype(np.float64)
    t = (1 - config.label_smoothing) * t + config.label_smoothing / x.shape[-1]
    if config.kind == "sigmoid":
        p = 1 / (1 + np.exp(-x))
        return -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(axis=-1)
    z = np.exp(x).sum(axis=-1, keepdims=True)
    return -(t * np.log(np.exp(x) / z)).sum(axis=-1) + config.z_loss * np.log(z[:, 0]) ** 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", [ONE_HOT, MIXED, MULTI_LABEL], ids=["one-hot", "mixed", "multi-label"])
def test_loss_of_each_example_equals_the_formula(name: str, targets: np.ndarray) -> None:
    config = CONFIGS[name]
    config.validate()
    if config.kind == "softmax" and targets is MULTI_LABEL:
        targets = targets / targets.sum(axis=-1, keepdims=True)  # several labels, equally likely
    loss = classification_loss(jnp.array(LOGITS), jnp.array(targets), config)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, by_hand(LOGITS, targets, config), rtol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("confidence", "right"), [(1e4, True), (1e4, False), (3e38, True)])
def test_extreme_logits_cost_their_margin_and_stay_finite(kind: str, confidence: float, right: bool) -> None:
    logits = np.full((1, CLASSES), 0 if kind == "softmax" else -confidence, np.float32)
    logits[0, 2] = confidence
    target = np.eye(CLASSES, dtype=np.float32)[[2 if right else 1]]
    loss_of = functools.partial(classification_loss, targets_BC=target, config=LossConfig(kind=kind))
    # Wrong: softmax gives up its margin over the label; sigmoid its logits of the winner and of the label.
    expected = 0.0 if right else confidence * {"softmax": 1, "sigmoid": 2}[kind]
    np.testing.assert_allclose(loss_of(logits), [expected], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: loss_of(x).sum())(logits)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_probabilities_less_targets(name: str) -> None:
    config = CONFIGS[name]
    gradient = jax.grad(lambda x: classification_loss(x, jnp.array(MIXED), config).sum())(jnp.array(LOGITS))
    x, a = LOGITS.astype(np.float64), config.label_smoothing
    t = (1 - a) * MIXED + a / CLASSES
    if config.kind == "sigmoid":
        expected = 1 / (1 + np.exp(-x)) - t
    else:
        z = np.exp(x).sum(axis=-1, keepdims=True)
        expected = np.exp(x) / z * (1 + 2 * config.z_loss * np.log(z)) - t
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_at_head_bias_minus_10_sigmoid_pulls_the_wrong_classes_by_its_value_there() -> None:
    """sigmoid(-10) = 4.54e-5: a thousand wrong classes together weigh less than the right one, at -1."""
    logits, targets = np.full((1, 1000), -10, np.float32), np.eye(1000, dtype=np.float32)[:1]
    loss = functools.partial(classification_loss, targets_BC=targets, config=LossConfig(kind="sigmoid"))
    gradient = jax.grad(lambda x: loss(x).sum())(logits)
    wrong = 1 / (1 + math.exp(10))
    np.testing.assert_allclose(gradient[0, 1:], wrong, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], wrong - 1, rtol=1e-6)
    np.testing.assert_allclose(loss(logits), [10 - 1000 * math.log1p(-wrong)], rtol=1e-6)


@pytest.mark.parametrize(("kind", "smoothing"), [("softmax", 0.1), ("sigmoid", 0.4)])
def test_smoothed_one_hot_targets_still_sum_to_one(kind: str, smoothing: float) -> None:
    """The targets are what the gradient lacks of the probabilities."""
    config = LossConfig(kind=kind, label_smoothing=smoothing)
    gradient = jax.grad(lambda x: classification_loss(x, jnp.array(ONE_HOT), config).sum())(jnp.array(LOGITS))
    e = np.exp(LOGITS)
    probabilities = e / (1 + e) if kind == "sigmoid" else e / e.sum(axis=-1, keepdims=True)
    targets = probabilities - gradient
    np.testing.assert_allclose(targets.sum(axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.sort(targets, axis=-1)[:, :-1], smoothing / CLASSES, atol=1e-6)
    np.testing.assert_allclose(targets.max(axis=-1), 1 - smoothing + smoothing / CLASSES, rtol=1e-5)
