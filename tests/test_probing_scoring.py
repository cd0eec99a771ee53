"""What predictions are worth, against the device's metrics, NumPy, and an ordinary bootstrap."""

import json

import numpy as np
import pytest

from vit22b.config import LossConfig, RecipeError
from vit22b.metrics import classification_sums
from vit22b.probing.scoring import confusion, interval, read_answers, same_classes, score


def random_logits(count=500, classes=8):
    """In halves, so that ties are frequent."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=count).astype(np.int32)
    logits = np.round(2 * rng.normal(size=(count, classes))).astype(np.float32) / 2
    return logits, labels


def test_single_labels_are_scored_as_on_the_device():
    logits, labels = random_logits()
    logits[7] = np.nan
    expected = classification_sums(logits, labels, np.ones(len(labels), np.float32), LossConfig()).result()
    found = score(logits, labels, same_classes(8))
    for name in ("top1", "top5", "examples"):
        assert found.metrics[name] == pytest.approx(expected[name], abs=1e-7)
    assert np.isnan(found.metrics["loss"])
    finite = np.arange(len(labels)) != 7
    sums = classification_sums(logits[finite], labels[finite], np.ones(finite.sum(), np.float32), LossConfig())
    clean, expected = score(logits[finite], labels[finite], same_classes(8)), sums.result()
    assert clean.metrics == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(clean.bins[:, 0], sums.bin_count)
    assert clean.correct_N.mean() == pytest.approx(expected["top1"])


def test_any_right_label_counts_and_images_without_one_do_not(tmp_path):
    logits, labels = random_logits(count=60)
    rng = np.random.default_rng(1)
    right = [sorted(map(int, rng.permutation(8)[: rng.integers(0, 4)])) for _ in labels]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(right))
    found = score(logits, labels, read_answers("labels", str(path), 8, (), 60, 8))
    counted = [i for i in range(60) if right[i]]
    assert found.metrics["examples"] == len(counted)
    assert found.metrics["top1"] == pytest.approx(np.mean([logits[i].argmax() in right[i] for i in counted]))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = np.mean([-np.log(chances[i, right[i]].sum()) for i in counted])
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
def test_other_classes_are_mapped_and_no_further_ones_predicted(tmp_path, by_name):
    logits, _ = random_logits(count=90)
    labels = np.random.default_rng(2).integers(3, size=90)
    names, entries = ("cat", "dog", "elk"), ([5, 2], None, 7)
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(dict(zip(names, entries, strict=True)) if by_name else entries))
    found = score(logits, labels, read_answers("classes", str(path), 3, names, 90, 8))
    counted, allowed = labels != 1, np.array([2, 5, 7])
    predicted = allowed[logits[:, allowed].argmax(axis=1)]
    right = np.where(labels == 0, np.isin(predicted, [2, 5]), predicted == 7)
    assert found.metrics["examples"] == counted.sum()
    assert found.metrics["top1"] == pytest.approx(right[counted].mean())


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("labels", [[1]], "has 1 entries; needs 2, one for each image"),
        ("labels", [[1], [9]], "entry 1 has 9; needs class numbers, 0 to 7"),
        ("labels", [[], []], "leaves all images out"),
        ("classes", [0, 1], "has 2 entries; needs 3"),
        ("classes", {"cat": 0, "dog": 1, "cow": 2}, "'cow' is no class folder of the set; those are cat, dog, elk"),
        ("classes", {"cat": 0, "dog": 1}, "has no entry for class 'elk'"),
        ("classes", 3, "needs a list"),
    ],
)
def test_a_file_that_does_not_fit_is_told(tmp_path, kind, content, says):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError) as error:
        read_answers(kind, str(path), 3, ("cat", "dog", "elk"), 2, 8)
    assert str(error.value).startswith(f"--also={path}: {says}")


def test_the_interval_is_that_of_an_ordinary_bootstrap():
    correct = np.arange(200) % 3 == 0
    rng = np.random.default_rng(5)
    means = correct[rng.integers(200, size=(20_000, 200))].mean(axis=1)
    np.testing.assert_allclose(interval(correct), np.percentile(means, [2.5, 97.5]), atol=0.006)


def test_confusion_counts_pairs():
    logits = np.eye(3)[[0, 0, 1, 2]]
    np.testing.assert_array_equal(confusion(logits, np.array([0, 1, 1, 0]), 3), [[1, 0, 1], [1, 1, 0], [0, 0, 0]])
