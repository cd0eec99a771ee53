"""Files of named arrays: their bytes, several of them, and damaged ones."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distill.tensors import open_tensors, write_npz, write_safetensors, write_sharded_safetensors
from vit22b.errors import RecipeError


def test_large_models_are_written_as_several_files_and_an_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"a{i}": rng.normal(size=(10, i + 1)).astype(np.float32) for i in range(6)}
    write_sharded_safetensors(tmp_path, {k: v.shape for k, v in arrays.items()}, arrays.__getitem__, {}, max_bytes=400)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    # 40 + 80 + 120 + 160 bytes; 200; 240
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert open_tensors(tmp_path / files[0]).arrays.keys() == {"a0", "a1", "a2", "a3"}
    read = open_tensors(tmp_path).arrays
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_safetensors_files_are_those_of_the_format(tmp_path: Path) -> None:
    """Checked byte by byte: length, JSON, values in order, little-endian."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(7).reshape(())
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": (2, 3), "b": ()}, {"a": a, "b": b}.__getitem__, {"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
    }
    assert content[8 + length :] == a.tobytes() + b.tobytes()


@pytest.mark.parametrize("damage", ["truncated", "no header", "index without file"])
def test_a_damaged_file_is_answered_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": (4,)}, lambda name: np.zeros(4), {})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    if damage == "no header":
        path.write_bytes(b"\xff" * 100)
    if damage == "index without file":
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(RecipeError) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_arrays_of_two_bytes_are_bfloat16(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "x.npz", a=values.astype(ml_dtypes.bfloat16))
    write_npz(tmp_path / "y.npz", {"a": (2, 3)}, lambda name: values)
    for name in ("x.npz", "y.npz"):
        np.testing.assert_array_equal(open_tensors(tmp_path / name).arrays["a"].astype(np.float32), values)
