"""The sets of images that a probe is given: opened, told from others by their content, their classes numbered alike.

Folders named by integers are classes in the order of these. Two sets have the same classes where their folders' names
are equal, or the same integers. Of a set without folders (npz, tfds, digits) class numbers are known: a set of folders
goes with it where the names are these numbers, or those that TFDS has for its labels, as ImageNet's wnids.
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vit22b.errors import check
from vit22b.probing.config import ProbeConfig
from vit22b.probing.scoring import Answers, read_answers, same_classes
from vit22b.sources import Source, open_source

SAMPLES = 256  # images whose content is looked at


@dataclasses.dataclass(frozen=True)
class FurtherSource:
    """A set of --also."""

    name: str
    source: Source
    answers: Answers


def open_sources(config: ProbeConfig, image_size: int, num_classes: int) -> tuple[Source, Source]:
    """The training and the reported set, classes numbered alike; raises `RecipeError`.

    `image_size` and `num_classes` shape synthetic images only.
    """
    train = opened(config.train, "train", "--train", image_size, num_classes)
    val = opened(config.val, "validation", "--val", image_size, num_classes)
    last = max(train.num_classes, val.num_classes) - 1
    val = alike(val, train, f"give both folders of the same names, if need be empty, or of class numbers, 0 to {last}")
    same = train.fingerprint() == val.fingerprint() and content(train) == content(val)
    val.request.check(not same, "is the very set of --train; name another file or folder, or a split")
    return train, val


def open_further(text: str, train: Source, image_size: int, num_classes: int) -> FurtherSource:
    """The set that NAME=SOURCE[,labels=FILE|,classes=FILE] describes; raises `RecipeError`."""
    name, equals, rest = text.partition("=")
    spec, *options = rest.split(",")
    ok = bool(equals and spec) and name.isidentifier() and len(options) <= 1
    check(ok, "--also", text, "needs NAME=SOURCE, NAME=SOURCE,labels=FILE or NAME=SOURCE,classes=FILE; NAME a word")
    source = opened(spec, "validation", f"--also={name}", image_size, num_classes)
    if not options:
        remedy = "say which are which by classes=FILE"
        source = alike(source, train, remedy)
        # Of folders some classes may be missing; of numbers alone, fewer would mean others.
        ok = source.num_classes == num_classes or (bool(source.class_names) and source.num_classes < num_classes)
        check(ok, "--also", text, f"has {source.num_classes} classes, the training set {num_classes}; {remedy}")
        return FurtherSource(name, source, same_classes(num_classes))
    kind, _, path = options[0].partition("=")
    ok = kind in ("labels", "classes") and bool(path)
    check(ok, "--also", text, "after the comma needs labels=FILE or classes=FILE")
    answers = read_answers(kind, path, source.num_classes, source.class_names, len(source), num_classes)
    return FurtherSource(name, source, answers)


def opened(spec: str, split: str, flag: str, image_size: int, num_classes: int) -> Source:
    """A set with images; class folders that are integers, in the order of these, where text has 10 before 2."""
    source = open_source(spec, split, image_size=image_size, num_classes=num_classes, flag=flag)
    source.request.check(len(source) > 0, "has no images")
    numbers = integers(source.class_names)
    if numbers is None:
        return source
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    names = tuple(source.class_names[label] for label in order)
    return renumbered(dataclasses.replace(source, class_names=names), np.argsort(order).tolist())


def content(source: Source) -> str:
    """A hash of 256 images at equal distances, of all where there are fewer: as encoded, or of pixels.

    It tells other images from those of the same names and labels, which `Source.fingerprint` does not.
    """
    count = min(SAMPLES, len(source))
    digest = hashlib.sha256()
    for index in np.arange(count) * len(source) // count:
        image, _ = source.read(int(index))
        if isinstance(image, str):
            image_bytes = Path(image).read_bytes()
        else:
            image_bytes = image.getvalue() if isinstance(image, io.BytesIO) else image.tobytes()
        digest.update(hashlib.sha256(image_bytes).digest())
    return digest.hexdigest()[:16]


def alike(source: Source, train: Source, remedy: str) -> Source:
    """`source` with its classes numbered as those of `train`.

    Raises `RecipeError`, which ends with `remedy`, where the classes are others, or cannot be known to be the same.
    """
    mine, theirs = source.class_names, train.class_names
    numbers = integers(mine), integers(theirs)
    if mine == theirs or (numbers[0] is not None and numbers[0] == numbers[1]):
        return source  # also where neither has names: their numbers are trusted
    known = mine or source.label_names, theirs or train.label_names
    if (mine or theirs) and len(known[0]) == len(known[1]) and set(known[0]) == set(known[1]):
        return renumbered(source, [known[1].index(name) for name in known[0]])
    if mine and theirs:
        few = ", ".join(sorted(set(mine) ^ set(theirs))[:3])
        raise source.request.error(f"class folders differ from --train's in {few}; {remedy}")
    if numbers[0] is not None and max(numbers[0]) < max(train.num_classes, len(mine)):
        return renumbered(source, numbers[0])
    if numbers[1] == list(range(len(theirs))):
        return source
    if mine:
        raise source.request.error(f"{_example(mine)}, while --train has class numbers alone; {remedy}")
    raise source.request.error(f"has class numbers alone, while of --train {_example(theirs)}; {remedy}")


def _example(names: Sequence[str]) -> str:
    return f"class folders have names, such as {names[-1]!r}"


def integers(names: Sequence[str]) -> list[int] | None:
    """What the names say, if each is a non-negative integer and none is there twice, as 1 and 01 are."""
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return None
    found = [int(name) for name in names]
    return found if len(set(found)) == len(found) else None


def renumbered(source: Source, numbers: Sequence[int]) -> Source:
    """With `numbers[label]` as labels; another set in the fingerprint, unless all labels stay as they are."""
    if list(numbers) == list(range(len(numbers))):
        return source
    new = np.array(numbers)
    read = _Renumbered(source.read, new)
    return dataclasses.replace(
        source, read=read, num_classes=int(new.max()) + 1, identity=source.identity + new.tobytes()
    )


@dataclasses.dataclass(frozen=True)
class _Renumbered:
    """A function, rather than a closure: it is sent to workers."""

    read: Callable[[int], tuple[np.ndarray | io.BytesIO | str, int]]
    numbers: np.ndarray

    def __call__(self, index: int) -> tuple[np.ndarray | io.BytesIO | str, int]:
        image, label = self.read(index)
        return image, int(self.numbers[label])


def check_labels(source: Source, labels: np.ndarray) -> None:
    """Raises `RecipeError` where images have labels that are no classes, as those of a test set without labels."""
    lowest, highest, last = int(labels.min()), int(labels.max()), source.num_classes - 1
    wrong = (
        f"has labels from {lowest} to {highest}; needs class numbers, 0 to {last}, or --also NAME=SOURCE,labels=FILE"
    )
    source.request.check(lowest >= 0 and highest <= last, wrong)
