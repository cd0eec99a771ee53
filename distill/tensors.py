"""Files of named arrays, read lazily and written in one pass: safetensors, in one file or several, and npz.

What is read are NumPy views of mapped files: of a slice only the pages that it lies in are ever fetched.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vit22b.errors import RecipeError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
          "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, as the format's own readers allow


class Tensors(NamedTuple):
    arrays: Mapping[str, np.ndarray]  # views of files
    metadata: dict[str, str]


def open_tensors(path: Path) -> Tensors:
    """The arrays of a .safetensors or .npz file, of an index of safetensors files, or of a folder that holds one.

    Raises `RecipeError` where there is none, or a file is damaged.
    """
    if path.is_dir():
        usual = [path / name for name in (INDEX, "model.safetensors") if (path / name).exists()]
        files = usual[:1] or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise RecipeError(f"{path}: holds {len(files)} .safetensors files, none of the usual name; name the file")
        path = files[0]
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    if path.suffix == ".npz":
        return Tensors(_Npz(path), {})
    if path.suffix == ".json":
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise RecipeError(f"{path}: needs a .safetensors or .npz file; convert others with their own library first")


def _open_index(path: Path) -> Tensors:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: _open_safetensors(path.parent / name) for name in sorted(set(places.values()))}
        arrays = {name: files[file].arrays[name] for name, file in places.items()}
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise RecipeError(f"{path}: not an index of the files beside it ({error})") from error
    return Tensors(arrays, {key: text for file in files.values() for key, text in file.metadata.items()})


def _open_safetensors(path: Path) -> Tensors:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: bytes {start} to {end}")
            arrays[name] = data[start:end].view(dtype).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: not a whole safetensors file ({error})") from error
    return Tensors(arrays, metadata)


class _Npz(Mapping):
    """The arrays of an .npz file: views where it is not compressed, as NumPy writes it by default."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = np.load(path)
        except (ValueError, zipfile.BadZipFile) as error:
            raise RecipeError(f"{path}: not a whole .npz file ({error})") from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._file.files:
            raise KeyError(name)
        info = self._file.zip.getinfo(name + ".npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return self._bfloat16(self._file[name])
        with self._path.open("rb") as file:
            file.seek(info.header_offset)
            local = file.read(30)  # the local header's two lengths may differ from those of the central directory
            file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if not math.prod(shape):
                return np.zeros(shape, dtype)
            if fortran:
                return self._bfloat16(self._file[name])
            count = math.prod(shape)
            return self._bfloat16(np.memmap(self._path, dtype, "r", offset=file.tell(), shape=(count,)).reshape(shape))

    @staticmethod
    def _bfloat16(array: np.ndarray) -> np.ndarray:
        """NumPy saves bfloat16, which it does not know, as two bytes of anything."""
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.files)

    def __len__(self) -> int:
        return len(self._file.files)


Shapes = dict[str, tuple[int, ...]]


def write_safetensors(path: Path, shapes: Shapes, value: Callable[[str], np.ndarray], metadata: dict[str, str]) -> None:
    """One file of fp32 arrays, of which `value(name)` gives one after the other."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8 bytes
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = value(name)
            assert array.shape == shape, name
            file.write(np.ascontiguousarray(array, "<f4").data)
    temporary.rename(path)


def write_sharded_safetensors(
    folder: Path,
    shapes: Shapes,
    value: Callable[[str], np.ndarray],
    metadata: dict[str, str],
    max_bytes: int = 5_000_000_000,
) -> None:
    """model.safetensors in the folder, or files of at most `max_bytes` (but one array at least) and their index."""
    files: list[Shapes] = [{}]
    for name, shape in shapes.items():
        size = 4 * sum(map(math.prod, files[-1].values()))
        if files[-1] and size + 4 * math.prod(shape) > max_bytes:
            files.append({})
        files[-1][name] = shape
    if len(files) == 1:
        write_safetensors(folder / "model.safetensors", shapes, value, metadata)
        return
    places: dict[str, str] = {}
    for i, part in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, part, value, metadata)
        places |= dict.fromkeys(part, name)
    total = 4 * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_npz(path: Path, shapes: Shapes, value: Callable[[str], np.ndarray]) -> None:
    """One uncompressed .npz file of fp32 arrays."""
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name in shapes:
            with archive.open(name + ".npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(value(name), "<f4"))
    temporary.rename(path)
