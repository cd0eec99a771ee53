"""What predictions are worth: of a set with labels of its own, with corrected or several ones, or with other classes.

The files of --also NAME=SOURCE,labels=FILE and NAME=SOURCE,classes=FILE are JSON:

    labels    a list with an entry for each image of the source, in its order (ImageNet-ReaL)
    classes   an entry for each class of the source: a list by number, or an object by class folder. Only classes that
              occur here may be predicted (ObjectNet, ImageNet-A, ImageNet-R)

An entry is a class number of the training set; a list of them, any of which is right; or [] or null, which leaves the
image, or the class's images, out. Class folders count in the order of their names; of integers, where all are.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vit22b.errors import RecipeError, check
from vit22b.metrics import NUM_BINS

FLAG = "--also"
ROWS = 1024  # judged at a time
Z95 = 1.959964  # a normal variable lies within so many deviations in 95 % of all cases


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which classes of the training set are right for the images of a set, and which may be predicted."""

    right_RM: np.ndarray  # int32: a row's right classes, then -1; a row for each image, or each class of the set
    by_class: bool
    allowed_K: np.ndarray  # ascending

    def of(self, labels_N: np.ndarray) -> np.ndarray:
        """The right classes of images with these labels, (N, M), then -1; an image without any does not count."""
        return self.right_RM[labels_N] if self.by_class else self.right_RM


def same_classes(num_classes: int) -> Answers:
    """Of a set that has the training set's classes: the labels themselves are right."""
    return Answers(np.arange(num_classes, dtype=np.int32)[:, None], True, np.arange(num_classes))


def read_answers(
    kind: str, path: str, source_classes: int, class_names: tuple[str, ...], num_images: int, num_classes: int
) -> Answers:
    """The answers in a file of `kind` 'labels' or 'classes', as above, for a source of so many classes and images.

    `class_names` are the source's class folders, () where it has none. Raises `RecipeError` naming file and entry.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{FLAG}={path}: cannot be read as JSON ({error}); give a JSON file") from error
    by_class = kind == "classes"
    count, what = (source_classes, "class") if by_class else (num_images, "image")
    names: tuple[object, ...] = tuple(range(count))
    if by_class and isinstance(content, dict):
        names = class_names
        content = _by_folder(path, content, class_names, count)
    check(isinstance(content, list), FLAG, path, f"needs a list with an entry for each {what}")
    there = f"has {len(content)} entries; needs {count}, one for each {what} of the set"
    check(len(content) == count, FLAG, path, there)
    right = [_classes(path, name, entry, num_classes) for name, entry in zip(names, content, strict=True)]
    most = max(map(len, right), default=0)
    check(most > 0, FLAG, path, "leaves all images out; needs a right class for some")
    right_RM = np.array([row + [-1] * (most - len(row)) for row in right], np.int32)
    allowed = np.unique(right_RM[right_RM >= 0]) if by_class else np.arange(num_classes)
    return Answers(right_RM, by_class, allowed)


def _by_folder(path: str, content: dict, class_names: tuple[str, ...], count: int) -> list:
    """The entries in the order of the classes."""
    remedy = f"has entries by name, but the set's classes have none; give a list of {count} entries"
    check(bool(class_names), FLAG, path, remedy)
    known = set(class_names)
    for name in content:
        example = ", ".join(class_names[:3]) + (", ..." if len(class_names) > 3 else "")
        check(name in known, FLAG, path, f"{name!r} is no class folder of the set; those are {example}")
    for name in class_names:
        check(name in content, FLAG, path, f"has no entry for class {name!r}; null leaves its images out")
    return [content[name] for name in class_names]


def _classes(path: str, name: object, entry: object, num_classes: int) -> list[int]:
    """An entry's right classes."""
    found: list[int] = [] if entry is None else entry if isinstance(entry, list) else [entry]  # type: ignore[list-item]
    for number in found:
        ok = type(number) is int and 0 <= number < num_classes
        check(ok, FLAG, path, f"entry {name!r} has {json.dumps(number)}; needs class numbers, 0 to {num_classes - 1}")
    return found


def without_examples(labels_N: np.ndarray, answers: Answers, trained_K: np.ndarray) -> np.ndarray:
    """Which images cannot be right, (N,) bool: those that count, but none of whose right classes is in `trained_K`."""
    right_NM = answers.of(labels_N)
    return np.logical_and(np.any(right_NM >= 0, axis=1), ~np.any(np.isin(right_NM, trained_K), axis=1))


@dataclasses.dataclass(frozen=True)
class Score:
    """How good predictions are, over the images that count."""

    metrics: dict[str, float]  # 'top1', 'top5', 'loss', 'ece', 'examples', as in vit22b/metrics.py
    bins: np.ndarray  # (15, 3), fp64: of each bin of confidence the images, their mean confidence, and accuracy
    correct_N: np.ndarray  # bool: whether the prediction is right


def score(logits_NC: np.ndarray, labels_N: np.ndarray, answers: Answers) -> Score:
    """Judges logits of any float dtype; `labels_N` are the set's own.

    Top-k is right if any right class is among the first k of the allowed ones, in the order of vit22b/metrics.py; a
    class whose logit is -inf never is. The loss is -log of the probability that the right classes have together, by a
    softmax over the allowed ones. Raises `RecipeError` where no image counts.
    """
    right_NM = answers.of(labels_N)
    counted = np.flatnonzero((right_NM >= 0).any(axis=1))
    remedy = "none is of a class that the answers name; check that they are those of this set"
    check(len(counted) > 0, FLAG, f"{len(labels_N)} images", remedy)
    parts = []
    for start in range(0, len(counted), ROWS):
        rows = counted[start : start + ROWS]
        right_BM = right_NM[rows]
        image, slot = np.nonzero(right_BM >= 0)
        is_right_BC = np.zeros((len(rows), logits_NC.shape[1]), bool)
        is_right_BC[image, right_BM[image, slot]] = True
        parts.append(_judge(logits_NC[rows][:, answers.allowed_K], is_right_BC[:, answers.allowed_K]))
    rank_N, confidence_N, loss_N = map(np.concatenate, zip(*parts, strict=True))
    correct_N = rank_N == 0
    # Multiplied in fp32, as on the device. NaN falls into the first bin, and makes the calibration error NaN.
    bin_N = np.minimum((np.nan_to_num(confidence_N).astype(np.float32) * NUM_BINS).astype(int), NUM_BINS - 1)
    images, confidence, correct = (
        np.bincount(bin_N, of_image, NUM_BINS) for of_image in (np.ones(len(bin_N)), confidence_N, correct_N)
    )
    metrics = {
        "loss": float(loss_N.mean()),
        "top1": float(correct_N.mean()),
        "top5": float((rank_N < 5).mean()),
        "ece": float(np.abs(confidence - correct).sum() / len(bin_N)),
        "examples": len(bin_N),
    }
    filled = np.maximum(images, 1)
    return Score(metrics, np.stack([images, confidence / filled, correct / filled], axis=1), correct_N)


def _judge(logits_BK: np.ndarray, is_right_BK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes ahead of the foremost right one, probability of the winner, and loss: each (B,).

    As on the device, NaN is ahead of everything, and a right class with NaN is behind. Where all are -inf, the winner's
    probability is 0.
    """
    logits_BK = logits_BK.astype(np.float64)
    # Infinity compares as this number does. -inf is left for classes that are not right.
    order_BK = np.minimum(logits_BK, 1e300)
    usable_BK = np.logical_and(is_right_BK, logits_BK > -np.inf)
    any_usable_B = usable_BK.any(axis=1)
    foremost_B1 = np.where(usable_BK, order_BK, -np.inf).argmax(axis=1)[:, None]  # of equal ones the first
    best_B1 = np.where(any_usable_B[:, None], np.take_along_axis(order_BK, foremost_B1, axis=1), np.nan)
    not_before_BK = np.arange(logits_BK.shape[1]) >= foremost_B1
    rank_B = (~(order_BK < best_B1) & ~((order_BK == best_B1) & not_before_BK)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite gives NaN or an infinite loss
        top_B1 = np.maximum(logits_BK.max(axis=1, keepdims=True), -1e300)
        total_B = np.exp(logits_BK - top_B1).sum(axis=1)
        right_total_B = np.exp(np.where(is_right_BK, logits_BK, -np.inf) - best_B1).sum(axis=1)
        loss_B = (top_B1 - best_B1)[:, 0] + np.log(total_B) - np.log(right_total_B)
        loss_B = np.where(any_usable_B | np.isnan(total_B), loss_B, np.inf)
        return rank_B, np.where(total_B == 0, 0, 1 / total_B), loss_B


def interval(correct: np.ndarray, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of 0s and 1s, (N,) [Efron 1993, chapter 13].

    N draws with replacement from them have a binomial number of 1s, which is drawn directly: the same distribution.
    Where all are equal, every draw is too, which says nothing about other images: there it is Wilson's score interval
    [Wilson 1927].
    """
    count = len(correct)
    if correct.all() or not correct.any():
        reach = Z95**2 / (count + Z95**2)
        return (1 - reach, 1.0) if correct.all() else (0.0, reach)
    means = np.random.default_rng(seed).binomial(count, np.mean(correct), resamples) / count
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def confusion(logits_NC: np.ndarray, labels_N: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (rows) are taken for each class (columns), (C, C) int64."""
    pairs = labels_N.astype(np.int64) * num_classes + logits_NC.argmax(axis=1)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
