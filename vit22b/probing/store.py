"""Features of a set of images on disk: extracted once, by all devices, resumable, and never mistaken for others.

In a folder: manifest.json with what the features depend on; and of each chunk of batches, from each process that
extracted it, an .npy file per feature, numbered by chunk and process, and one of labels, which is written last. A
batch's rows lie in the files of the processes one after the other, as they computed them; rows of zeros fill up the
set's last batch.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from vit22b import data
from vit22b.config import Recipe
from vit22b.errors import RecipeError
from vit22b.flops import forward_flops
from vit22b.hardware import peak_flops
from vit22b.probing.rows import Features
from vit22b.sources import Source
from vit22b.train import local_part, place
from vit22b.workdir import check_same, own_temporary, write_json

MANIFEST = "manifest.json"
CHUNK_ROWS = 16_384  # in the files of a chunk, about: what a kill loses at most
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where row i of a set lies."""

    batch_size: int
    processes: int
    chunk_batches: int
    count: int  # of the set's images

    @property
    def share(self) -> int:
        """Rows of a batch in one process's file."""
        return self.batch_size // self.processes

    @property
    def chunks(self) -> int:
        return math.ceil(self.count / (self.batch_size * self.chunk_batches))

    def rows(self, chunk: int) -> int:
        """In each of a chunk's files."""
        batches = math.ceil(self.count / self.batch_size) - chunk * self.chunk_batches
        return min(batches, self.chunk_batches) * self.share

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each row's file, chunk by chunk and in these process by process, and its place there."""
        batch, position = np.divmod(rows, self.batch_size)
        process, place_in_batch = np.divmod(position, self.share)
        chunk, batch_in_chunk = np.divmod(batch, self.chunk_batches)
        return chunk * self.processes + process, batch_in_chunk * self.share + place_in_batch


class StoredColumn:
    """A `Column` whose rows are read from files, mapped into memory, when they are asked for."""

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        self._layout = layout
        self._files = [
            _load(file_of(folder, name, chunk, process), layout.rows(chunk))
            for chunk in range(layout.chunks)
            for process in range(layout.processes)
        ]
        self.shape, self.dtype = (layout.count, *self._files[0].shape[1:]), self._files[0].dtype

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        files, places = self._layout.find(rows)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number in np.unique(files):
            members = np.flatnonzero(files == number)
            out[members] = self._files[number][places[members]]
        return out


def file_of(folder: Path, name: str, chunk: int, process: int) -> Path:
    return folder / f"{name}-{chunk:06d}-{process:05d}.npy"


def extract(
    folder: Path,
    source: Source,
    recipe: Recipe,
    see: Callable[[jax.Array], dict[str, jax.Array]],
    identity: dict[str, object],
    note: Callable[[str], None],
) -> Features:
    """The features of every image of `source`, unaugmented: from `folder`, where what is missing is added first.

    `folder` is WORKDIR/features/FEATURES/SET.
    `see` makes a batch's features, by name, of uint8 images; `recipe` says how these are made and how many at a time.
    `identity` is what the features depend on: raises `RecipeError` where `folder` has those of something else.
    """
    names = list(identity["features"])  # type: ignore[call-overload]
    processes, batch_size = jax.process_count(), recipe.batch_size
    layout = Layout(batch_size, processes, max(CHUNK_ROWS // batch_size, 1), len(source))
    identity = json.loads(json.dumps(identity | {"images": len(source), "fingerprint": source.fingerprint()}))
    path = folder / MANIFEST
    if path.exists():
        manifest = read_manifest(path)
        what = f"--workdir={folder.parents[2]}: its features of {folder.name} have"
        check_same(manifest["identity"], identity, what, f"give another --workdir, or remove {folder}")
        begun = Layout(**manifest["layout"])
        if _first_missing(folder, begun) < begun.chunks and begun != layout:
            raise RecipeError(
                f"--workdir={folder.parents[2]}: {folder.name} was begun by {begun.processes} processes, "
                f"{begun.batch_size} images at a time; go on with as many, or remove {folder}"
            )
        layout = begun
    else:
        if folder.exists() and any(each.suffix != ".tmp" for each in folder.iterdir()):
            raise RecipeError(f"--workdir={folder.parents[2]}: {folder} holds files but no {MANIFEST}; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_json(path, {"identity": identity, "layout": dataclasses.asdict(layout)})
    first = _first_missing(folder, layout)
    if first < layout.chunks:
        if first:
            note(f"{folder.name}: goes on at image {first * layout.chunk_batches * batch_size:,}")
        _extract_chunks(folder, source, recipe, see, layout, first, note)
    columns = {name: StoredColumn(folder, name, layout) for name in names}
    labels = StoredColumn(folder, "labels", layout)[np.arange(layout.count)]
    return Features(columns, labels, source.num_classes)


def _extract_chunks(folder, source, recipe, see, layout: Layout, first: int, note: Callable[[str], None]) -> None:
    """Writes chunk `first` and all after it; the devices are a batch ahead."""
    begun = time.perf_counter()
    start = first * layout.chunk_batches
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = data.eval_batches(source, recipe, **process, start_batch=start)
    pending: list[tuple[dict[str, jax.Array], np.ndarray]] = []
    rows: dict[str, list[np.ndarray]] = {}
    chunk = first
    total = math.ceil(layout.count / layout.batch_size)

    def keep() -> None:
        seen, labels = pending.pop(0)
        for name, array in ({n: local_part(x) for n, x in seen.items()} | {"labels": labels}).items():
            rows.setdefault(name, []).append(array)

    for number, batch in enumerate(batches, start):
        pending.append((see(place({"image": batch["image"]})["image"]), batch["label"]))
        if len(pending) > 2:
            keep()
        if (number + 1) % layout.chunk_batches == 0 or number + 1 == total:
            while pending:
                keep()
            for name in sorted(rows, key=lambda name: name == "labels"):  # these last: they say that all are there
                _write(file_of(folder, name, chunk, jax.process_index()), np.concatenate(rows[name]))
            rows.clear()
            chunk += 1
            note(f"{folder.name}: {min((number + 1) * layout.batch_size, layout.count):,} of {layout.count:,} images")
    batches.close()
    speed = (layout.count - start * layout.batch_size) / (time.perf_counter() - begun)
    peak = peak_flops(jax.devices()[0])
    used = "" if peak is None else f", {speed * forward_flops(recipe.model) / peak / jax.device_count():.1%} MFU"
    note(f"{folder.name}: {speed:,.0f} images/s{used}, compilation included")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"extracted {folder}")


def _first_missing(folder: Path, layout: Layout) -> int:
    """The first chunk that some process has not written. All processes see all files, and wait until they do."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"looking at {folder}")
    complete = (
        all(file_of(folder, "labels", chunk, process).exists() for process in range(layout.processes))
        for chunk in range(layout.chunks)
    )
    return next((chunk for chunk, there in enumerate(complete) if not there), layout.chunks)


def _write(path: Path, array: np.ndarray) -> None:
    """A kill leaves no half of it."""
    temporary = own_temporary(path)
    with open(temporary, "wb") as file:
        np.save(file, array.view(np.uint16) if array.dtype == BF16 else array)
    temporary.rename(path)


def _load(path: Path, rows: int) -> np.ndarray:
    """A file of so many rows, mapped into memory; raises `RecipeError`."""
    try:
        array = np.load(path, mmap_mode="r")
        whole = len(array) == rows
    except (OSError, ValueError, EOFError, TypeError):
        whole = False
    if not whole:
        raise RecipeError(f"{path}: is damaged or missing; remove {path.parent} to extract again")
    # .npy files know no bf16: its bits lie there as uint16.
    return array.view(BF16) if array.dtype == np.uint16 else array


def read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        Layout(**manifest["layout"])
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: is damaged; remove {path.parent} to extract again") from error
