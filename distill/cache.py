"""What teachers said of views, stored: one pass of the teachers, any number of runs of students with one seed.

A view's place in the run's stream of examples, with the recipe's seed, decides its crop, its augmentation and, with
its step, what it is mixed with. So a cache belongs to a stream: the views of `cached_steps` steps, which training sees
again, in this order, as often as it takes. A fixed target per image, to which any crop would be shown, is not offered:
students fit to that over [Beyer 2022, section 3].

In the folder: manifest.json, and for each chunk of steps and each process that wrote it a file of ArrayRecord with a
record per view: its index in the stream; then, of each teacher, at the recipe's temperature, the `top_k` most probable
classes, the logarithms of their probabilities in fp16 and of what all other classes have together in fp32, which is
spread evenly over these; or summary and patches in bf16, standardised.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from array_record.python import array_record_module

from distill.config import DistillRecipe
from vit22b.errors import RecipeError, check
from vit22b.workdir import check_same, is_resumable, write_json

MANIFEST = "manifest.json"
CHUNK_STEPS = 100  # in a file; what a kill loses at most
GROUP = 64  # records that are compressed together
INDEX = np.dtype("<u8")
# Fields of `DistillConfig` that decide what is stored.
DECIDING = (
    "teaching",
    "match",
    "temperature",
    "image_sizes",
    "eval_crop_fractions",
    "eval_resizes",
    "widths",
    "matmul",
    "top_k",
    "cached_steps",
    "statistics_batches",
)
OF_LOGITS = ("classes", "log_probs", "others")  # what is stored of a teacher's, as distill/top_classes.py has it

Array = tuple[np.dtype, tuple[int, ...]]  # dtype and shape


def identity(recipe: DistillRecipe, fingerprints: dict[str, str]) -> dict[str, object]:
    """What a cache and a run that uses it must have in common: what decides a view, or what a teacher says of it."""
    fields = recipe.flat()
    decides = {
        name: value
        for name, value in fields.items()
        if name in ("seed", "batch_size", "model.image_size", "model.patch_size", "model.num_classes")
        or (name.startswith("data.") and not is_resumable(name))
    }
    for name in DECIDING:
        decides[f"distill.{name}"] = fields[f"distill.{name}"]
    kept = {name: value for name, value in fingerprints.items() if name != "validation"}
    return json.loads(json.dumps(decides | {f"{name} fingerprint": value for name, value in kept.items()}))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays of a record, by name as in a batch: dtype and shape of a view's, in order."""

    arrays: dict[str, Array]

    @classmethod
    def of(cls, recipe: DistillRecipe) -> "Layout":
        arrays: dict[str, Array] = {}
        number = np.min_scalar_type(recipe.model.num_classes - 1).newbyteorder("<")  # the smallest for all classes
        for i in range(len(recipe.distill.teachers)):
            if recipe.distill.match == "logits":
                k = recipe.top_k()
                stored: list[Array] = [(number, (k,)), (np.dtype("<f2"), (k,)), (np.dtype("<f4"), ())]
                arrays |= {f"{name}_{i}": each for name, each in zip(OF_LOGITS, stored, strict=True)}
            else:
                width, bf16 = recipe.distill.widths[i], np.dtype(ml_dtypes.bfloat16)
                arrays |= {f"summary_{i}": (bf16, (width,)), f"patches_{i}": (bf16, (recipe.model.grid**2, width))}
        return cls(arrays)

    @property
    def size(self) -> int:
        """Of a record."""
        return INDEX.itemsize + sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.arrays.values())

    def description(self) -> dict[str, object]:
        """As the manifest has it."""
        return {name: [dtype.name, *shape] for name, (dtype, shape) in self.arrays.items()}

    def pack(self, index: int, view: dict[str, np.ndarray]) -> bytes:
        parts = [np.array(index, INDEX).tobytes()]
        for name, (dtype, shape) in self.arrays.items():
            assert view[name].shape == shape
            parts.append(np.ascontiguousarray(view[name].astype(dtype)).tobytes())
        return b"".join(parts)

    def unpack(self, records: list[bytes]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Indices in the stream, and the arrays stacked."""
        whole = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self.size)
        indices, start, arrays = whole[:, : INDEX.itemsize].copy().view(INDEX)[:, 0], INDEX.itemsize, {}
        for name, (dtype, shape) in self.arrays.items():
            size = dtype.itemsize * math.prod(shape)
            arrays[name] = whole[:, start : start + size].copy().view(dtype).reshape(len(records), *shape)
            start += size
        return indices, arrays


def chunk_path(folder: Path, chunk: int, process: int) -> Path:
    return folder / f"views-{chunk:06d}-{process:05d}.arrayrecord"


def chunks(recipe: DistillRecipe, chunk_steps: int) -> list[range]:
    """The steps in each."""
    steps = recipe.distill.cached_steps
    return [range(start, min(start + chunk_steps, steps)) for start in range(0, steps, chunk_steps)]


def is_whole(path: Path, views: int) -> bool:
    """Whether a chunk's file is there with so many records; of one that was cut off, no record can be read."""
    if not path.exists():
        return False
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()  # which tells what went wrong at the opening
    except RuntimeError:
        return False
    return found == views


class Writer:
    """Writes the views of this process; `missing` says which chunks, after a kill, are still to be done."""

    def __init__(self, folder: Path, recipe: DistillRecipe, found: dict[str, object]) -> None:
        self._folder, self._recipe, self._layout = folder, recipe, Layout.of(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": found,
            "processes": jax.process_count(),
            "chunk_steps": CHUNK_STEPS,
            "record": self._layout.description(),
            "bytes_per_view": self._layout.size,
        }
        path = folder / MANIFEST
        if path.exists():
            manifest = read_manifest(folder, found, self._layout)
            same = manifest["processes"] == jax.process_count()
            check(same, "distill.cache", folder, "was begun by another number of processes; go on with as many")
        elif any(folder.iterdir()):
            raise RecipeError(f"distill.cache={folder}: holds files but no {MANIFEST}; give a new or empty folder")
        elif jax.process_index() == 0:
            write_json(path, content)

    @property
    def bytes_per_view(self) -> int:
        return self._layout.size

    def missing(self) -> list[range]:
        """The steps of each chunk that lacks a process's file: for all the same, as teachers need all devices."""
        count = jax.process_count()
        return [
            steps
            for chunk, steps in enumerate(chunks(self._recipe, CHUNK_STEPS))
            if not all(
                is_whole(chunk_path(self._folder, chunk, process), len(steps) * self._recipe.batch_size // count)
                for process in range(count)
            )
        ]

    def write(self, steps: range, batches) -> None:
        """A chunk: `batches` gives, for each step, this process's part of the arrays of `Layout`."""
        path = chunk_path(self._folder, steps.start // CHUNK_STEPS, jax.process_index())
        temporary = path.with_suffix(".tmp")
        writer = array_record_module.ArrayRecordWriter(str(temporary), f"group_size:{GROUP}")
        for step, batch in zip(steps, batches, strict=True):
            size = len(next(iter(batch.values())))
            first = step * self._recipe.batch_size + jax.process_index() * size
            for position in range(size):
                view = {name: array[position] for name, array in batch.items()}
                writer.write(self._layout.pack(first + position, view))
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a machine that dies later may otherwise leave an empty file of the final name
        temporary.rename(path)


class Reader:
    """Reads, a step ahead in the background, this process's part of what the teachers said of a step's views."""

    def __init__(self, folder: Path, recipe: DistillRecipe, found: dict[str, object]) -> None:
        self._folder, self._recipe, self._layout = folder, recipe, Layout.of(recipe)
        manifest = read_manifest(folder, found, self._layout)
        self._processes, self._chunk_steps = manifest["processes"], manifest["chunk_steps"]
        missing = [
            path.name
            for chunk, steps in enumerate(chunks(recipe, self._chunk_steps))
            for path in (chunk_path(folder, chunk, process) for process in range(self._processes))
            if not is_whole(path, len(steps) * recipe.batch_size // self._processes)
        ]
        some = ", ".join(missing[:3])
        remedy = f"lacks {len(missing)} whole files ({some}{', ...' * (len(missing) > 3)}); run launch/teach.py again"
        check(not missing, "distill.cache", folder, remedy)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._ahead: dict[int, concurrent.futures.Future] = {}
        self._open: tuple[Path, array_record_module.ArrayRecordReader] | None = None

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of `Layout`, of the views of a step, which may lie beyond the last one that is cached."""
        future = self._ahead.pop(step, None) or self._pool.submit(self._read, step)
        self._ahead = {step + 1: self._pool.submit(self._read, step + 1)}
        return future.result()

    def _read(self, step: int) -> dict[str, np.ndarray]:
        step %= self._recipe.distill.cached_steps
        batch, here = self._recipe.batch_size, jax.process_count()
        written, wanted = batch // self._processes, batch // here  # of a step, by one process
        first = jax.process_index() * wanted
        records: list[bytes] = []
        chunk, row = divmod(step, self._chunk_steps)
        for process in range(first // written, (first + wanted - 1) // written + 1):
            start = max(first - process * written, 0)
            stop = min(first + wanted - process * written, written)
            path = chunk_path(self._folder, chunk, process)
            try:
                records += self._reader(path).read(row * written + start, row * written + stop)
            except (RuntimeError, IndexError, OSError) as error:
                remedy = f"{path.name} is damaged; delete it and run launch/teach.py again"
                raise RecipeError(f"distill.cache={self._folder}: {remedy}") from error
        indices, arrays = self._layout.unpack(records)
        expected = step * batch + first + np.arange(wanted)
        if not np.array_equal(indices, expected):
            raise RecipeError(f"distill.cache={self._folder}: step {step} has other views; write it anew")
        return arrays

    def _reader(self, path: Path) -> array_record_module.ArrayRecordReader:
        if self._open is None or self._open[0] != path:
            self._open = (path, array_record_module.ArrayRecordReader(str(path)))
        return self._open[1]


def read_manifest(folder: Path, identity: dict[str, object], layout: Layout) -> dict:
    """Raises `RecipeError` unless it is a cache's, of this stream of views and these teachers."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        old, record, _, _ = (manifest[name] for name in ("identity", "record", "processes", "chunk_steps"))
    except OSError as error:
        raise RecipeError(f"distill.cache={folder}: has no {MANIFEST}; launch/teach.py makes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"distill.cache={folder}: its {MANIFEST} is not a cache's; give a new folder") from error
    # A field that only one version of the code has decides nothing.
    common = old.keys() & identity.keys()
    what, remedy = f"distill.cache={folder}: is of other views, with", "give another folder, or the recipe it is of"
    check_same({name: old[name] for name in common}, {name: identity[name] for name in common}, what, remedy)
    check_same(record, layout.description(), f"distill.cache={folder}: stores something else,", "give a new folder")
    return manifest
