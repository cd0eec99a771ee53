"""Random-access sources of labelled images: what the fields `data.train` and `data.validation` may name.

    digits[:SPLIT]          scikit-learn's 1,797 embedded 8x8 digits; no download
    synthetic[:SPLIT]       noise, to measure the speed of everything but the reading of files
    npz:PATH[:SPLIT]        one file: pixels, or a pack of small JPEGs that share one header
    folder:PATH[:SPLIT]     a subfolder of images per class
    tfds:NAME[:SPLIT]       a prepared TensorFlow data set, read without TensorFlow

Every image comes out as RGB, uint8, height x width x 3: grey is repeated, CMYK and palettes are converted, alpha is
dropped and of 16 bits the upper 8 are kept, as in torchvision and TensorFlow. Unlike there, EXIF rotation is applied:
photos from a phone would lie on their side, while of ImageNet's images about 1 in 500 is affected.
"""

import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vit22b.errors import RecipeError, check

SPLITS = ("train", "validation", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
NO_LABEL = 65535  # in a JPEG pack


@dataclasses.dataclass(frozen=True)
class Request:
    """A source as it is asked for, `FIELD='TEXT'`; `rest` is what follows the kind in `text`."""

    text: str
    rest: str
    default_split: str
    field: str  # of a recipe, or a flag

    def error(self, remedy: str) -> RecipeError:
        return RecipeError(f"{self.field}={self.text!r}: {remedy}")

    def check(self, ok: bool, remedy: str) -> None:
        check(ok, self.field, repr(self.text), remedy)

    def split(self, given: str, splits: Iterable[str]) -> str:
        """`given`, or the default split if that is ''; raises `RecipeError` unless it is one of `splits`."""
        split = "validation" if given == "val" else given or self.default_split
        self.check(split in splits, f"no split {split!r}; splits there: {', '.join(splits)}")
        return split

    def path_and_split(self) -> tuple[str, str]:
        """The path, which must exist, and the split or ''. A path may hold ':' itself."""
        self.check(self.rest != "", f"needs a path, as in '{self.text.partition(':')[0]}:/data/birds'")
        head, _, tail = self.rest.rpartition(":")
        path, split = (head, tail) if head and tail in SPLITS else (self.rest, "")
        path, head = os.path.expanduser(path), os.path.expanduser(head)
        unknown = os.path.exists(head) and not os.path.exists(path)
        self.check(not unknown, f"no split {tail!r}; splits are named {', '.join(SPLITS)}")
        self.check(os.path.exists(path), f"{path} does not exist on this machine")
        return path, split


@dataclasses.dataclass(frozen=True)
class Source:
    """`source[i]` is (image uint8 (H, W, 3), label int), H and W differing from image to image. Picklable."""

    request: Request
    size: int
    num_classes: int
    read: Callable[[int], tuple[np.ndarray | io.BytesIO | str, int]]  # pixels, encoded image or its path; label
    identity: bytes  # what makes it this data set and no other, wherever it lies
    class_names: tuple[str, ...] = ()  # of folders only, where the labels follow from them
    label_names: tuple[str, ...] = ()  # of tfds only, where labels are numbers, and have a name besides

    @property
    def name(self) -> str:
        """As in the recipe."""
        return self.request.text

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} images, none at {index}")
        image, label = self.read(index)
        if isinstance(image, np.ndarray):
            return image, label
        try:
            return decode(image), label
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # all of these are Pillow's
            what = image if isinstance(image, str) else f"image {index} of the split"
            raise self.request.error(f"cannot decode {what} ({type(e).__name__}: {e}); repair or replace it") from e

    def fingerprint(self) -> str:
        """Kind, length and a hash of names or labels, not of pixels; kept in checkpoints to notice changed data."""
        digest = hashlib.sha256(f"{self.num_classes} ".encode() + self.identity).hexdigest()[:16]
        return f"{self.name.partition(':')[0]}-{self.size}-{digest}"

    def some(self, count: int) -> "Source":
        """`count` of the images, the same ones whatever the recipe's seed, in the order they lie in."""
        chosen = np.sort(np.random.default_rng(0).permutation(self.size)[:count])
        return self.only(chosen, f" {count}".encode())

    def only(self, chosen: np.ndarray, mark: bytes) -> "Source":
        """The images of these numbers, in this order; `mark` tells the choice from others in the fingerprint."""
        read = _Chosen(self.read, chosen)
        return dataclasses.replace(self, size=len(chosen), read=read, identity=self.identity + mark)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A function, rather than a closure: it is sent to workers."""

    read: Callable[[int], tuple[np.ndarray | io.BytesIO | str, int]]
    chosen: np.ndarray

    def __call__(self, index: int) -> tuple[np.ndarray | io.BytesIO | str, int]:
        return self.read(int(self.chosen[index]))


def open_source(spec: str, default_split: str, *, image_size: int, num_classes: int, flag: str = "") -> Source:
    """Opens `spec`, one of the forms above.

    `default_split`, 'train' or 'validation', is the split if `spec` names none. Errors name `flag`, or the recipe's
    field of the default split. `image_size` and `num_classes` shape the synthetic images only. Raises `RecipeError`.
    """
    kinds: dict[str, Callable[[Request], Source]] = {
        "digits": _digits,
        "synthetic": functools.partial(_synthetic, image_size, num_classes),
        "npz": _npz,
        "folder": _folder,
        "tfds": _tfds,
    }
    kind, _, rest = spec.partition(":")
    request = Request(spec, rest, default_split, flag or f"data.{default_split}")
    request.check(kind in kinds, f"unknown kind of source {kind!r}; kinds: {', '.join(kinds)}{_closest(kind, kinds)}")
    try:
        return kinds[kind](request)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:  # damaged, or not what it seems
        if isinstance(e, RecipeError):
            raise
        raise request.error(f"cannot be read ({type(e).__name__}: {' '.join(str(e).split())})") from e


def _closest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def decode(file: str | io.BytesIO) -> np.ndarray:
    """The image in `file` as RGB uint8 (H, W, 3), as said at the top. Raises Pillow's errors."""
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        if "transparency" in image.info:  # a transparent palette entry; converted directly, Pillow warns
            return np.asarray(image.convert("RGBA").convert("RGB"))
        return np.asarray(image.convert("RGB"))


# For each kind, what opens it, preceded by what reads it: once its first arguments are bound, that is `Source.read`.
# Readers are functions of this module, and so can be sent to worker processes.


def _read_pixels(images: np.ndarray, labels: np.ndarray, i: int) -> tuple[np.ndarray, int]:
    image = images[i]
    return (np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image), int(labels[i])


def _digits(request: Request) -> Source:
    split = request.split(request.rest, ("train", "validation"))
    from sklearn.datasets import load_digits  # a second of import that no other source needs

    data = load_digits()
    # RandomState's streams are frozen for good, unlike Generator's: the split stays what it is.
    order = np.random.RandomState(0).permutation(1797)
    order = order[:1437] if split == "train" else order[1437:]
    images = np.round(data.images[order] * (255 / 16)).astype(np.uint8)
    labels = data.target[order].astype(np.int32)
    return Source(request, len(order), 10, functools.partial(_read_pixels, images, labels), labels.tobytes())


def _read_noise(noise: np.ndarray, image_size: int, num_classes: int, i: int) -> tuple[np.ndarray, int]:
    # Multiplying by a large odd number scatters neighbours. Images overlap in the buffer, but start elsewhere.
    scattered = (i * 2_654_435_761) % 2**32
    start = scattered % (len(noise) - image_size**2 * 3)
    return noise[start : start + image_size**2 * 3].reshape(image_size, image_size, 3), scattered % num_classes


def _synthetic(image_size: int, num_classes: int, request: Request) -> Source:
    sizes = {"train": 1_281_167, "validation": 50_000}  # ImageNet's
    size = sizes[request.split(request.rest, sizes)]
    noise = np.random.RandomState(0).randint(0, 256, image_size**2 * 3 + 2**16, dtype=np.uint8)
    read = functools.partial(_read_noise, noise, image_size, num_classes)
    return Source(request, size, num_classes, read, str(image_size).encode())


def _read_pack(header: bytes, scans: np.ndarray, starts: np.ndarray, labels: np.ndarray, i: int) -> tuple[Any, int]:
    jpeg = header + scans[starts[i] : starts[i + 1]].tobytes() + b"\xff\xd9"  # FFD9: JPEG's end of image
    return io.BytesIO(jpeg), int(labels[i])


def _npz(request: Request) -> Source:
    """Pixels: `images` uint8 (N, H, W, 3) or (N, H, W), `labels` (N,) and optionally `n_train`.

    Small JPEGs: `header` (or `header0`), the bytes that all share; `scans`, the rest of each but its end marker, one
    after the other; their `lengths`; `labels`, 65535 for none; and optionally `n_train` or `split_sizes`.
    """
    path, split = request.path_and_split()
    request.check(zipfile.is_zipfile(path), f"{path} is no .npz file, as numpy.savez writes it")
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    pack, keys = {"scans", "lengths", "labels"} <= data.keys(), ", ".join(sorted(data))
    request.check(pack or {"images", "labels"} <= data.keys(), f"has keys {keys}; needs images and labels")
    labels = data["labels"]
    ok = labels.ndim == 1 and labels.dtype.kind in "iu" and labels.min(initial=0) >= 0
    request.check(ok, f"labels are {labels.dtype} {labels.shape}; needs integers (N,) from 0 up")
    labels = labels.astype(np.int64)
    parts = _npz_splits(request, len(labels), data)
    parts = {name: part for name, part in parts.items() if not (pack and NO_LABEL in labels[part])}
    part = parts[request.split(split, parts)]
    num_classes = 1 + max(int(labels[p].max(initial=-1)) for p in parts.values())  # splits must agree on it
    count, labels = len(labels), labels[part].astype(np.int32)
    if pack:
        starts = np.concatenate([[0], np.cumsum(data["lengths"], dtype=np.int64)])[part.start : part.stop + 1]
        scans = data["scans"].view(np.uint8)[starts[0] : starts[-1]]  # workers get their split's only
        header = data["header" if "header" in data else "header0"].tobytes()
        read = functools.partial(_read_pack, header, scans, starts - starts[0], labels)
        identity = starts.tobytes() + labels.tobytes()
    else:
        images = data["images"]
        ok = images.dtype == np.uint8 and images.ndim in (3, 4) and images.shape[3:] in ((), (3,))
        wanted, got = f"uint8 ({count}, H, W, 3) or ({count}, H, W)", f"{images.dtype} {images.shape}"
        request.check(ok and len(images) == count, f"images are {got}; needs {wanted}")
        read = functools.partial(_read_pixels, images[part], labels)
        identity = str(images.shape[1:]).encode() + labels.tobytes()
    return Source(request, len(labels), num_classes, read, identity)


def _npz_splits(request: Request, count: int, data: dict[str, np.ndarray]) -> dict[str, slice]:
    """The rows of each split. Without sizes, all are one split, serving either field: two files can be two splits."""
    if "n_train" in data:
        sizes = [int(data["n_train"]), count - int(data["n_train"])]
    elif "split_sizes" in data:
        sizes = data["split_sizes"].tolist()
    else:
        return {request.default_split: slice(0, count)}
    request.check(min(sizes) >= 0 and sum(sizes) == count, f"splits of {sizes} images do not add up to {count}")
    ends = np.cumsum(sizes).tolist()
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return dict(zip(("train", "validation", "test"), parts, strict=False))


def _read_file(folder: str, names: np.ndarray, labels: np.ndarray, i: int) -> tuple[str, int]:
    return os.path.join(folder, os.fsdecode(names[i])), int(labels[i])


def _folder(request: Request) -> Source:
    """PATH/CLASS/.../IMAGE, or PATH/SPLIT/CLASS/.../IMAGE; labels number the sorted class folders, empty ones too."""
    path, split = request.path_and_split()
    there = [name for name in SPLITS if _subfolders(os.path.join(path, name))]
    if split or there:
        asked = split or request.default_split
        wanted = [asked] if asked in ("train", "test") else ["validation", "val"] + ["test"] * (not split)
        found = [name for name in wanted if name in there]
        request.check(bool(found), f"no {wanted[0]}/CLASS/IMAGE in {path}; splits there: {', '.join(there) or 'none'}")
        path = os.path.join(path, found[0])
    class_names = _subfolders(path)
    files = [_images(path, class_name) for class_name in class_names]
    count = sum(map(len, files))
    request.check(count > 0, f"no images in {path}; needs CLASS/IMAGE there, with {' '.join(EXTENSIONS)}")
    # Arrays, as each worker gets a copy: a list of str would take several times the memory.
    names = np.array([os.fsencode(name) for of_class in files for name in of_class])
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(of_class) for of_class in files])
    read = functools.partial(_read_file, path, names, labels)
    return Source(request, count, len(class_names), read, names.tobytes(), class_names)


def _subfolders(path: str) -> tuple[str, ...]:
    """Sorted, without hidden ones; none if `path` is no folder."""
    return tuple(sorted(name.rstrip("/") for name in glob.glob("*/", root_dir=path)))


def _images(path: str, class_name: str) -> list[str]:
    """Sorted image files anywhere below `path`/`class_name`, relative to `path`, without hidden ones."""
    files = glob.iglob(glob.escape(class_name) + "/**/*", root_dir=path, recursive=True)
    return sorted(file for file in files if file.lower().endswith(EXTENSIONS))


def _read_tfds(examples: Any, image_key: str, label_key: str, i: int) -> tuple[io.BytesIO, int]:
    example = examples[i]
    return io.BytesIO(example[image_key]), int(example[label_key])


def _tfds(request: Request) -> Source:
    """A data set that TFDS has prepared in its array_record format, under TFDS_DATA_DIR."""
    match = re.fullmatch(r"(?P<name>[^:\[\]]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?", request.rest)
    if match is None:
        raise request.error("needs a name, as in 'tfds:imagenet2012' or 'tfds:imagenet2012:train[:99%]'")
    name, split = match["name"], match["split"]
    import tensorflow_datasets as tfds  # seconds of import that no other source needs; it imports no TensorFlow

    data_dir = os.path.expanduser(os.environ["TFDS_DATA_DIR"]) if "TFDS_DATA_DIR" in os.environ else None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError, ImportError) as e:  # unknown name, configuration or version; needs a package
        close = _closest(name, tfds.list_builders(with_community_datasets=False))  # with them it imports TensorFlow
        raise request.error(str(e).splitlines()[0].rstrip(".") + close) from e
    ready = builder.is_prepared() and "array_record" in {f.value for f in builder.info.available_file_formats()}
    request.check(
        ready,
        f"not prepared as array_record in {builder.data_path}; once, on any machine: pip install "
        f"tensorflow-cpu tensorflow-datasets && tfds build {name} --file_format=array_record; then set "
        "TFDS_DATA_DIR to where it is, if not ~/tensorflow_datasets",
    )
    info = builder.info
    image_key, label_key = (info.supervised_keys or ("image", "label"))[:2]
    features = {key: type(info.features[key]).__name__ for key in info.features}
    ok = {(image_key, "Image"), (label_key, "ClassLabel")} <= features.items()
    request.check(ok, f"not images with one label each; its features: {features}")
    if split is None:
        test = request.default_split == "validation" and "validation" not in info.splits
        split = "test" if test else request.default_split
    try:
        examples = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except (ValueError, OSError, RuntimeError) as e:
        raise request.error(f"{str(e).splitlines()[0].rstrip('.')}; splits there: {', '.join(info.splits)}") from e
    read = functools.partial(_read_tfds, examples, image_key, label_key)
    labels, identity = info.features[label_key], f"{info.full_name} {split}".encode()
    return Source(request, len(examples), labels.num_classes, read, identity, label_names=tuple(labels.names))
