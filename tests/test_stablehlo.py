"""The exported program, read back as a user would, against the model that it came from."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from conftest import MeshFactory
from test_convert import config_of, random_model

from distill import stablehlo
from distill.tensors import open_tensors
from vit22b.errors import RecipeError

# Without this code and its packages.
RUN = """
import sys, numpy as np, jax, jax.export
program, weights, images, outputs = sys.argv[1:]
assert not any(name.split(".")[0] in ("vit22b", "distill", "flax") for name in sys.modules)
content = np.load(weights)
program = jax.export.deserialize(bytearray(open(program, "rb").read()))
result = program.call({name: content[name] for name in content.files}, np.load(images))
np.savez(outputs, **{name: np.asarray(value, np.float32) for name, value in result.items()})
"""


@pytest.mark.parametrize(
    ("batch", "fields"),
    [
        (1, {}),
        (3, {"block": "sequential", "position": "rope", "class_token": True, "pool": "cls_gap", "matmul": "bf16"}),
    ],
    ids=["ViT-22B", "sequential"],
)
def test_the_program_computes_what_the_model_does(batch: int, fields: dict, mesh: MeshFactory, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    with mesh(1, 2, 2):  # from a model in parts
        model = random_model(config_of(fields))
        stablehlo.export(model, tmp_path / "vit.stablehlo")
    images = np.random.default_rng(0).normal(size=(batch, 32, 32, 3)).astype(np.float32)
    with mesh():
        local = jax.tree.map(np.asarray, model)
        expected = jax.jit(lambda model, x: model(x))(local, images)
    np.save(tmp_path / "images.npy", images)
    arrays = open_tensors(tmp_path / "vit.stablehlo.safetensors").arrays
    np.savez(tmp_path / "weights.npz", **arrays)
    files = ["vit.stablehlo", "weights.npz", "images.npy", "outputs.npz"]
    command = [sys.executable, "-c", RUN, *(str(tmp_path / file) for file in files)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "outputs.npz")
    for name in ("logits", "pooled", "tokens"):
        value = np.asarray(getattr(expected, name), np.float32)
        tolerance = 1e-5 if model.config.matmul == "fp32" else 2e-2
        assert np.abs(outputs[name] - value).max() <= tolerance * np.abs(value).max(), name


def test_the_program_is_lowered_for_all_platforms(mesh: MeshFactory, tmp_path: Path) -> None:
    exported = stablehlo.program(config_of({}))
    assert exported.platforms == stablehlo.PLATFORMS
    assert exported.nr_devices == 1
    (tmp_path / "there").write_text("")
    with mesh(), pytest.raises(RecipeError, match="is there already"):
        stablehlo.export(random_model(config_of({})), tmp_path / "there")
