"""Which sets of images a probe takes for which: the same content, the same classes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit22b.errors import RecipeError
from vit22b.probing import sets
from vit22b.probing.config import ProbeConfig
from vit22b.probing.scoring import same_classes, without_examples
from vit22b.probing.sets import check_labels, content, open_further, open_sources
from vit22b.sources import open_source

WORDS = ("bee", "cat", "dog")


def make_folder(path: Path, names: tuple[str, ...], per_class: int = 1, seed: int = 0) -> str:
    """Images whose red is the place of their class in `names`, and the others noise."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
            pixels[..., 0] = label
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return f"folder:{path}"


def make_npz(path: Path, labels: list[int], seed: int = 0) -> str:
    images = np.random.default_rng(seed).integers(256, size=(len(labels), 4, 4, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels))
    return f"npz:{path}"


def opened(train: str, val: str):
    return open_sources(ProbeConfig(model="m", train=train, val=val), 8, 10)


def labels_by_red(source) -> dict[int, int]:
    """Of a folder of `make_folder`: the label that each of its `names` has."""
    return {int(image[0, 0, 0]): label for image, label in (source[i] for i in range(len(source)))}


def test_other_images_under_the_same_names_are_known_and_a_moved_folder_is_the_same(tmp_path):
    specs = [make_folder(tmp_path / f"{seed}{n}", WORDS, 2, seed) for seed, n in ((0, 1), (0, 2), (5, 1))]
    here, moved, other = (open_source(spec, "train", image_size=8, num_classes=3) for spec in specs)
    assert here.fingerprint() == moved.fingerprint() == other.fingerprint()
    assert content(here) == content(moved) != content(other)
    npz = [make_npz(tmp_path / f"{seed}.npz", [0, 1, 2], seed) for seed in (0, 1)]
    first, second = (open_source(spec, "train", image_size=8, num_classes=3) for spec in npz)
    assert first.fingerprint() == second.fingerprint()
    assert content(first) != content(second)


@pytest.mark.parametrize("count", [4, 5, 7])
def test_the_images_looked_at_are_spread_over_the_set(tmp_path, monkeypatch, count):
    """Of up to four, each counts; of more, the first of each fourth."""
    monkeypatch.setattr(sets, "SAMPLES", 4)
    before = np.random.default_rng(0).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    changed = []
    for i in range(count + 1):
        images = before.copy()
        images[i : i + 1] += 1
        np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(count, int))
        changed.append(content(open_source(f"npz:{tmp_path}/x.npz", "train", image_size=8, num_classes=1)))
    seen = [i for i in range(count) if changed[i] != changed[count]]
    assert seen == sorted({i * count // 4 for i in range(4)})


def test_folders_go_with_tfds_by_the_names_of_its_labels(tmp_path, monkeypatch):
    """In whichever order TFDS has them; sets of other names do not."""
    folder, other = make_folder(tmp_path / "f", WORDS), make_folder(tmp_path / "o", ("bee", "cat", "eel"))
    arrays, of_spec = make_npz(tmp_path / "a.npz", [0, 1, 2]), sets.open_source
    names = ("dog", "bee", "cat")

    def as_tfds(spec, *args, **kwargs):
        source = of_spec(spec, *args, **kwargs)
        return source if spec.startswith("folder") else dataclasses.replace(source, label_names=names)

    monkeypatch.setattr(sets, "open_source", as_tfds)
    _, val = opened(arrays, folder)
    assert labels_by_red(val) == {red: names.index(word) for red, word in enumerate(WORDS)}
    train, val = opened(folder, arrays)
    assert labels_by_red(train) == {0: 0, 1: 1, 2: 2}
    assert [val[i][1] for i in range(3)] == [WORDS.index(names[label]) for label in (0, 1, 2)]
    with pytest.raises(RecipeError, match="class folders have names, such as 'eel'"):
        opened(arrays, other)


def test_folders_of_integers_are_numbered_by_them(tmp_path):
    """As text they would be 0, 1, 10, 11, 2, ...: so ImageNetV2's are."""
    numbers = tuple(str(i) for i in range(12))
    train, val = opened(make_folder(tmp_path / "a", numbers), make_folder(tmp_path / "b", numbers, seed=1))
    assert labels_by_red(train) == labels_by_red(val) == {i: i for i in range(12)}
    assert train.class_names == numbers
    padded = make_folder(tmp_path / "c", tuple(f"{i:03d}" for i in range(12)), seed=2)
    assert labels_by_red(open_further(f"x={padded}", train, 8, 12).source) == {i: i for i in range(12)}
    assert train.fingerprint() != open_source(train.name, "train", image_size=8, num_classes=1).fingerprint()


def test_folders_of_integers_go_with_class_numbers_alone(tmp_path):
    """Also where a set has only some of the classes."""
    some = make_folder(tmp_path / "some", ("3", "10", "0"))
    npz = make_npz(tmp_path / "a.npz", list(range(12)))
    train, val = opened(npz, some)
    assert labels_by_red(val) == {0: 3, 1: 10, 2: 0}
    assert labels_by_red(open_further(f"x={some}", train, 8, 12).source) == {0: 3, 1: 10, 2: 0}
    train, val = opened(make_folder(tmp_path / "all", tuple(str(i) for i in range(12))), npz)
    assert labels_by_red(train) == {i: i for i in range(12)}
    assert [val[i][1] for i in range(12)] == list(range(12))


@pytest.mark.parametrize(
    ("train", "other", "says"),
    [
        (WORDS, ("ant", "bee", "cat"), "class folders differ from --train's in ant, dog"),
        (WORDS, ("0", "1", "2"), "class folders differ from --train's in 0, 1, 2"),
        (("0", "1", "2"), ("1", "2", "3"), "class folders differ from --train's in 0, 3"),
        (None, WORDS, "class folders have names, such as 'dog', while --train has class numbers alone"),
        (None, ("5", "6", "7"), "class folders have names, such as '7', while --train has class numbers alone"),
        (None, ("1", "01", "2"), "class folders have names, such as '2', while --train has class numbers alone"),
        (WORDS, None, "has class numbers alone, while of --train class folders have names, such as 'dog'"),
        (("1", "2", "3"), None, "has class numbers alone, while of --train class folders have names, such as '3'"),
    ],
)
def test_sets_whose_classes_may_be_others_are_refused(tmp_path, train, other, says):
    """As many classes are not enough."""
    specs = [
        make_npz(tmp_path / f"{i}.npz", [0, 1, 2], i)
        if names is None
        else make_folder(tmp_path / str(i), names, seed=i)
        for i, names in enumerate((train, other))
    ]
    with pytest.raises(RecipeError) as error:
        opened(*specs)
    assert str(error.value).startswith(f"--val={specs[1]!r}: {says}; give both folders of the same names")
    source = sets.opened(specs[0], "train", "--train", 8, 3)
    with pytest.raises(RecipeError) as error:
        open_further(f"x={specs[1]}", source, 8, 3)
    assert str(error.value) == f"--also=x={specs[1]!r}: {says}; say which are which by classes=FILE"
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([2, 1, 0]))
    assert len(open_further(f"x={specs[1]},classes={path}", source, 8, 3).source) == 3


def test_a_set_of_numbers_alone_needs_as_many_classes(tmp_path):
    source = sets.opened(make_npz(tmp_path / "a.npz", [0, 1, 2]), "train", "--train", 8, 3)
    spec = make_npz(tmp_path / "b.npz", [0, 1], 1)
    with pytest.raises(RecipeError, match="has 2 classes, the training set 3; say which are which by classes=FILE"):
        open_further(f"x={spec}", source, 8, 3)
    folder = make_folder(tmp_path / "c", ("0", "1", "2", "3"))
    with pytest.raises(RecipeError, match="has 4 classes, the training set 3; say which are which by classes=FILE"):
        open_further(f"x={folder}", source, 8, 3)


def test_the_very_set_is_refused_but_not_another_of_the_same_names(tmp_path):
    here, other = make_folder(tmp_path / "a", WORDS), make_folder(tmp_path / "b", WORDS, seed=1)
    copy = make_folder(tmp_path / "c", WORDS)
    assert len(opened(here, other)) == 2
    with pytest.raises(RecipeError, match=f"--val='{copy}': is the very set of --train"):
        opened(here, copy)


def test_labels_that_are_no_classes_are_refused():
    source = dataclasses.replace(sets.opened("digits", "train", "--val", 8, 10), num_classes=3)
    check_labels(source, np.array([0, 2, 1]))
    for labels, found in (([0, -1, 2], "-1 to 2"), ([1, 3], "1 to 3")):
        with pytest.raises(RecipeError, match=f"^--val='digits': has labels from {found}; needs class numbers, 0 to 2"):
            check_labels(source, np.array(labels))


def test_images_cannot_be_right_whose_classes_nothing_was_trained_on():
    answers = same_classes(4)
    found = without_examples(np.array([0, 1, 2, 3]), answers, np.array([0, 2]))
    np.testing.assert_array_equal(found, [False, True, False, True])
    several = dataclasses.replace(answers, by_class=False, right_RM=np.array([[1, 2], [1, -1], [-1, -1]]))
    np.testing.assert_array_equal(without_examples(np.zeros(3, int), several, np.array([0, 2])), [False, True, False])
