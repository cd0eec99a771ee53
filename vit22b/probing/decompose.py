"""What a linear probe's error comes from: the risk decomposition of [Dubois 2023, arXiv 2302.03068].

One frozen encoder and probes of the same settings, trained and measured on different rows, give three errors:

    fitted      trained on the training set, measured on the same rows
    unseen      trained on the training set without some rows, measured on those: new to the probe, not to the encoder
    test        trained on the training set, measured on the test set: new to both

Each part of the error is what one step makes worse:

    approximation             training error of a supervised model of the encoder's architecture
    usability                 fitted - approximation: classes that the features do not separate linearly
    probe_generalization      unseen - fitted: too few labelled rows for the probe
    encoder_generalization    test - unseen: features are better on images that the encoder was trained on

All this takes the encoder to be pretrained on the images of the training set, and on none like the test set's that the
training set lacks. An encoder that saw other images knows the rows held back no better than the test set, and what it
fails to generalise is not found: encoder_generalization is then little more than how much the two sets differ. Parts
are differences of measured errors, so that small ones can be negative.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vit22b.errors import check
from vit22b.probing import heads
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features

LEAST_RATIO = 5  # of all training rows to those held back


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """The errors by the names above, 1 - top-1; the parts are their differences and add up to the test error."""

    approximation: float | None  # None: not known, and counted into usability
    fitted: float
    unseen: float
    test: float

    def to_json(self) -> dict[str, float | None]:
        """The parts: approximation (may be None), usability, probe_generalization, encoder_generalization; total."""
        return {
            "approximation": self.approximation,
            "usability": self.fitted - (self.approximation or 0),
            "probe_generalization": self.unseen - self.fitted,
            "encoder_generalization": self.test - self.unseen,
            "total": self.test,
        }


def decompose(
    whole: Heads,
    fit: Callable[[np.ndarray], Heads],
    train: Features,
    test: Features,
    seed: int,
    approximation: float | None,
) -> Decomposition:
    """Of the head `whole`, trained on all of `train`, and of one that `fit(rows)` trains alike on some rows of it.

    `approximation` is the training error of a supervised model, in [0, 1], or None. The estimators are those of section
    4 of the paper, with errors for losses. The authors tune probes anew for each error; here settings are fixed, so
    that errors differ by rows alone. Raises `RecipeError`.
    """
    kept, held_back = split(train.labels, len(test), seed)
    return Decomposition(
        approximation,
        fitted=_error(whole, train, np.arange(len(train))),
        unseen=_error(fit(kept), train, held_back),
        test=_error(whole, test, np.arange(len(test))),
    )


def _error(head: Heads, features: Features, rows: np.ndarray) -> float:
    (sums,) = heads.measure(head, features, rows)
    return 1 - sums.result()["top1"]


def split(labels_N: np.ndarray, num_test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training rows to train on and those to hold back, (N - M,) and (M,) int, ascending.

    M is the number of test rows, as in the paper, but at most a fifth of N (our bound): a probe with far fewer rows to
    train on says little about one with all of them. Each class gives its share, rounded up or down. Raises
    `RecipeError` for fewer than 5 rows.
    """
    count = min(num_test, len(labels_N) // LEAST_RATIO)
    check(count > 0, "--decompose", "true", f"needs {LEAST_RATIO} training images or more, not {len(labels_N)}")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels_N))
    by_class = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    # Rows at equal distances of N / M, from a random start.
    places = (np.arange(count) * len(labels_N) + rng.integers(len(labels_N))) // count
    held_back = np.sort(by_class[places])
    return np.setdiff1d(np.arange(len(labels_N)), held_back), held_back
