"""Weights of other libraries, without these libraries: files, round trips, shardings, mistakes, and real sizes.

That the mappings mean what the libraries compute is shown in test_convert_reference.py.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import MeshFactory
from jax.sharding import get_mesh

from distill import convert, weights
from distill.layouts import LAYOUTS
from distill.layouts.tables import Published, read, their_shapes
from distill.tensors import open_tensors, write_safetensors
from launch import convert as program
from vit22b import step
from vit22b.checkpoint import Checkpoints
from vit22b.config import DataConfig, OptimConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.sharding import concrete
from vit22b.workdir import open_workdir, read_recipe

ROOT = Path(__file__).parent.parent
SEQUENTIAL = {"block": "sequential", "norm": "layer", "qk_norm": "none"}
BIASES = {"norm_bias": True, "qkv_bias": True, "proj_bias": True}
CLASS = {"class_token": True, "pool": "cls"}
PLAIN = {"position_resampling": "cubic_plain"}
SCALED = {"layer_scale": 0.1}
ROPE = {"position": "rope", "num_classes": 1}
SIGLIP = SEQUENTIAL | BIASES | {"num_classes": 1}
INTERNVIT = {"block": "sequential", "norm": "rms", "qk_norm": "width", "proj_bias": True, "mlp": "gelu"} | CLASS
INTERNVIT |= SCALED | PLAIN | {"final_norm": "none", "num_classes": 1}
SQUARE = {"eval_crop_fraction": 1.0, "eval_resize": "square"}  # of preprocessing
# For each layout configurations that it can express, together with every part that it may have.
EXPRESSIBLE: dict[str, list[dict[str, Any]]] = {
    "hf-vit": [SEQUENTIAL | BIASES | CLASS | PLAIN, SEQUENTIAL | CLASS | PLAIN | {"num_classes": 1, "mlp_bias": False}],
    "hf-dinov2": [
        SEQUENTIAL | BIASES | PLAIN | SCALED | {"class_token": True, "pool": "cls_gap"},
        SEQUENTIAL | BIASES | CLASS | SCALED | {"num_registers": 3, "mlp": "swiglu", "mlp_dim": 88, "num_classes": 1},
    ],
    "hf-dinov3": [
        SEQUENTIAL | BIASES | CLASS | SCALED | ROPE | {"num_registers": 2},
        SEQUENTIAL | CLASS | SCALED | ROPE | {"mlp": "swiglu", "mlp_bias": False},
    ],
    "hf-siglip": [SIGLIP | PLAIN],
    "hf-siglip2-naflex": [SIGLIP | {"position_resampling": "linear"}],
    "hf-internvl-vision": [INTERNVIT, INTERNVIT | {"norm": "layer", "qk_norm": "none"} | BIASES],
    "hf-internvit": [INTERNVIT, INTERNVIT | {"norm": "layer", "qk_norm": "none"} | BIASES],
    "timm-parallel": [{}, {"norm": "layer", "pool": "gap", "num_registers": 2} | BIASES, CLASS],
    "timm-vit": [
        SEQUENTIAL | BIASES | CLASS | SCALED | {"num_registers": 2},
        SEQUENTIAL | {"mlp": "swiglu", "pool": "gap", "final_norm": "pooled"},
        {"block": "sequential", "position": "none"},
        SEQUENTIAL | BIASES,
    ],
    "timm-eva": [
        SEQUENTIAL
        | BIASES
        | CLASS
        | {"position": "learned_rope", "rope_grid": 4, "mlp": "swiglu", "mlp_sub_norm": True},
        SEQUENTIAL | BIASES | CLASS | SCALED | {"position": "rope", "mlp": "gelu", "num_registers": 2},
    ],
    "npz-big-vision": [SEQUENTIAL | BIASES, SEQUENTIAL | BIASES | CLASS, SEQUENTIAL | BIASES | {"pool": "gap"}],
}
CASES = [(name, fields) for name, all_fields in EXPRESSIBLE.items() for fields in all_fields]
IDS = [f"{name}-{i}" for name, all_fields in EXPRESSIBLE.items() for i in range(len(all_fields))]


def config_of(fields: dict[str, Any]) -> ModelConfig:
    shape = {"width": 32, "depth": 3, "mlp_dim": 64, "num_heads": 4, "num_classes": 5, "image_size": 32}
    config = ModelConfig(**shape | {"patch_size": 8, "matmul": "fp32"} | fields)
    config.validate()
    return config


def random_model(config: ModelConfig, zero: tuple[str, ...] = ()) -> ViT:
    """A model with random parameters; those whose names end as in `zero`, and a classifier of one class, are zero."""
    abstract, rng = concrete(abstract_model(config), get_mesh()), np.random.default_rng(0)
    values = []
    for name, leaf in named_leaves(abstract).items():
        blank = name.endswith(zero) or (name.startswith("head_") and config.num_classes == 1)
        value = np.zeros(leaf.shape) if blank else rng.normal(size=leaf.shape)
        values.append(jax.device_put(value.astype(np.float32), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def written(layout: str, fields: dict[str, Any], folder: Path) -> tuple[ViT, str]:
    """A random model, and how the files are called that hold it in that layout."""
    library, _, family = layout.partition("-")
    model = random_model(config_of(fields), ("key_bias",) if family == "eva" else ())
    path = folder / {"hf": "model", "timm": "model.safetensors", "npz": "model.npz"}[library]
    assert convert.save(model, library, path, layout_name=layout).name == layout
    return model, f"{library}:{path}"


def assert_same(one: ViT, other: ViT) -> None:
    for (name, a), b in zip(named_leaves(one).items(), named_leaves(other).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def test_every_layout_has_a_configuration_here() -> None:
    assert EXPRESSIBLE.keys() == LAYOUTS.keys()


@pytest.mark.parametrize(("layout", "fields"), CASES, ids=IDS)
def test_a_round_trip_through_files_is_bitwise(layout: str, fields: dict, mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model, spec = written(layout, fields, tmp_path)
        source = weights.open_source(spec, overrides={"matmul": "fp32"})
        assert source.layout.name == layout
        assert_same(convert.load(source), model)
        if not spec.startswith("npz"):  # which holds no description: what no tensor tells is not known
            assert source.config == model.config


@pytest.mark.parametrize(("layout", "fields"), CASES, ids=IDS)
def test_every_value_of_every_parameter_has_a_place_of_its_own(
    layout: str, fields: dict, mesh: MeshFactory, tmp_path: Path
) -> None:
    """Numbers that occur once in ours occur once in theirs, and nothing else but zeros does."""
    with mesh():
        config = config_of(fields)
        abstract, start, values = concrete(abstract_model(config), get_mesh()), 1, []
        unplaced = [r.ours for r in LAYOUTS[layout].rules(config, None) if not r.theirs]
        for name, leaf in named_leaves(abstract).items():
            numbers = np.zeros(leaf.size) if name in unplaced else np.arange(start, start + leaf.size)
            start += 0 if name in unplaced else leaf.size
            values.append(jax.device_put(numbers.astype(np.float32).reshape(leaf.shape), leaf.sharding))
        model = jax.tree.unflatten(jax.tree.structure(abstract), values)
        library = layout.split("-")[0]
        path = tmp_path / {"hf": "model", "timm": "model.safetensors", "npz": "model.npz"}[library]
        convert.save(model, library, path, layout_name=layout)
    found = np.concatenate([np.ravel(array) for array in open_tensors(path).arrays.values()])
    np.testing.assert_array_equal(np.sort(found[found != 0]), np.arange(1, start))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("layout", ["hf-dinov2", "timm-eva", "npz-big-vision"])
def test_eight_devices_load_what_one_does(
    layout: str, shape: tuple[int, int, int], mesh: MeshFactory, tmp_path: Path
) -> None:
    with mesh():
        model, spec = written(layout, EXPRESSIBLE[layout][0], tmp_path)
    with mesh(*shape) as m:
        loaded = convert.load(weights.open_source(spec))
        wanted = named_leaves(concrete(abstract_model(loaded.config), m))
        for name, leaf in named_leaves(loaded).items():
            assert leaf.sharding == wanted[name].sharding, name
    assert_same(loaded, model)


@pytest.mark.parametrize("layout", ["hf-dinov2", "timm-parallel"])
def test_eight_devices_write_what_one_does(layout: str, mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        _, spec = written(layout, EXPRESSIBLE[layout][0], tmp_path)
    library, _, path = spec.partition(":")
    with mesh(2, 2, 2):
        model = convert.load(weights.open_source(spec))
        other = tmp_path / "other.safetensors" if library == "timm" else tmp_path / "other"
        convert.save(model, library, other)
    one, eight = open_tensors(Path(path)), open_tensors(other)
    assert one.metadata == eight.metadata
    assert one.arrays.keys() == eight.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, eight.arrays[name], err_msg=name)


def test_a_devices_part_is_read_without_the_rest(mesh: MeshFactory, tmp_path: Path) -> None:
    """Of a file of holes, of 1.6 GB, pages are mapped where they are read."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's count of mapped pages")
    config = config_of(EXPRESSIBLE["hf-siglip"][0] | {"width": 2048, "mlp_dim": 8192, "depth": 8})
    layout = LAYOUTS["hf-siglip"]
    shapes = their_shapes(layout.rules(config, None), weights.our_shapes(config), config)
    (tmp_path / "config.json").write_text(json.dumps(layout.describe(config)))
    size = write_holes(tmp_path / "model.safetensors", shapes)
    assert size > 1.5e9
    source = weights.open_source(f"hf:{tmp_path}")
    # A 64th of one matrix of the MLP in all layers, rows and columns apart, as on a mesh of 8 x 8.
    index = (slice(0, 8), slice(256, 512), slice(1024, 2048))
    before = mapped_bytes()
    part = read(source.rules, "blocks/mlp/out", index, (8, 8192, 2048), source.arrays, source.config)
    assert part.shape == (8, 256, 1024)
    # Columns of theirs are 1 KB of each row of 32 KB, in pages of 4 KB.
    assert mapped_bytes() - before < 8 * 1024 * 2 * 65536
    assert mapped_bytes() - before < size / 2
    rows = (slice(0, 8), slice(0, 2048), slice(1024, 1280))  # which are contiguous in theirs
    before = mapped_bytes()
    read(source.rules, "blocks/mlp/up", rows, (8, 2048, 8192), source.arrays, source.config)
    assert mapped_bytes() - before < 1.5 * 8 * 2048 * 256 * 4


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of zeros that takes no space."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name], offset = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def mapped_bytes() -> int:
    """Bytes of files that are mapped into this process and present."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_sources_of_other_precision_are_read_as_they_are(dtype: Any, mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        _, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][0], tmp_path)
        path = Path(spec.removeprefix("timm:"))
        full = open_tensors(path)
        names = {"bfloat16": "BF16", "float16": "F16", "float64": "F64"}
        content, header = b"", {"__metadata__": full.metadata}
        for name, array in full.arrays.items():
            raw = np.ascontiguousarray(array.astype(dtype)).tobytes()
            offsets = [len(content), len(content) + len(raw)]
            header[name] = {"dtype": names[np.dtype(dtype).name], "shape": array.shape, "data_offsets": offsets}
            content += raw
        text = json.dumps(header).encode()
        (tmp_path / "other.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
        loaded = convert.load(weights.open_source(f"timm:{tmp_path / 'other.safetensors'}"))
        original = convert.load(weights.open_source(spec))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(original), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(dtype).astype(np.float32))


def test_a_model_in_bf16_takes_half_and_computes_the_same_up_to_rounding(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh(1, 2, 2):
        _, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][0], tmp_path)
        source = weights.open_source(spec, overrides={"matmul": "bf16"})
        full, half = convert.load(source), convert.load(source, jnp.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
        x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
        one, other = (np.asarray(jax.jit(lambda model, x: model(x).logits)(m, x)) for m in (full, half))
    assert one.dtype == other.dtype == np.float32
    assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(one)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("root", ["", "params/img/"])
def test_npz_files_of_all_kinds_are_read(
    compressed: bool, stacked: bool, root: str, mesh: MeshFactory, tmp_path: Path
) -> None:
    with mesh():
        model, spec = written("npz-big-vision", EXPRESSIBLE["npz-big-vision"][0], tmp_path)
        arrays = {k.removeprefix("params/"): v for k, v in np.load(spec.removeprefix("npz:")).items()}
        if stacked:
            inner = "Transformer/encoderblock_0/"
            names = [name.removeprefix(inner) for name in arrays if name.startswith(inner)]
            stacks = {
                f"Transformer/encoderblock/{n}": np.stack(
                    [arrays[f"Transformer/encoderblock_{i}/{n}"] for i in range(3)]
                )
                for n in names
            }
            arrays = {k: v for k, v in arrays.items() if "encoderblock_" not in k} | stacks
        arrays = {root + name: value for name, value in arrays.items()}
        if root:  # SigLIP's file holds a text tower too
            arrays |= {"params/txt/head/bias": np.ones(3), "params/t": np.ones(1), "params/b": np.ones(1)}
        (np.savez_compressed if compressed else np.savez)(tmp_path / "other.npz", **arrays)
        assert_same(convert.load(weights.open_source(f"npz:{tmp_path / 'other.npz'}")), model)


def changed(spec: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites a safetensors file of timm's with other arrays."""
    path = Path(spec.removeprefix("timm:"))
    tensors = open_tensors(path)
    arrays = {name: np.array(array) for name, array in tensors.arrays.items()}
    change(arrays)
    write_safetensors(path, {k: v.shape for k, v in arrays.items()}, arrays.__getitem__, tensors.metadata)


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.__setitem__(new, arrays.pop(old))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("blocks.1.mlp.fc1.bias"), "missing: blocks.1.mlp.fc1.bias"),
        (lambda a: a.setdefault("blocks.3.norm1.bias", np.zeros(32)), "unexpected: blocks.3.norm1.bias"),
        (rename("norm.weight", "norm.wieght"), "missing: norm.weight; unexpected: norm.wieght"),
        (
            lambda a: a.__setitem__("blocks.2.attn.proj.weight", np.zeros((32, 33))),
            r"of another shape: blocks.2.attn.proj.weight \(32, 33\) instead of \(32, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable, message: str, mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        _, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][0], tmp_path)
        changed(spec, change)
        with pytest.raises(RecipeError, match=message):
            weights.open_source(spec)


def test_what_has_no_place_must_be_zero_in_both_directions(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model = random_model(config_of(EXPRESSIBLE["timm-eva"][0]))
        with pytest.raises(
            RecipeError, match="blocks/attention/key_bias: is not zero, and timm-eva has no place for it"
        ):
            convert.save(model, "timm", tmp_path / "eva.safetensors")
        assert not list(tmp_path.iterdir())
        _, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][1], tmp_path)  # without biases
        changed(spec, lambda arrays: arrays.__setitem__("blocks.1.attn.proj.bias", np.ones(32)))
        with pytest.raises(RecipeError, match=r"blocks.1.attn.proj.bias: is not zero"):
            weights.open_source(spec)


def test_a_model_that_no_layout_expresses_is_answered_with_the_fields(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model = random_model(config_of({"pool": "gap"}))
        with pytest.raises(RecipeError, match=r"--to hf: none of hf-vit, .* has such a model .*; use timm: or stable"):
            convert.save(model, "hf", tmp_path / "x")
        with pytest.raises(RecipeError, match=r"model\.block='parallel': cannot be written as hf-vit"):
            convert.save(model, "hf", tmp_path / "x", layout_name="hf-vit")
        with pytest.raises(RecipeError, match="--layout=hf-vti: choose one of"):
            convert.save(model, "hf", tmp_path / "x", layout_name="hf-vti")
    assert not (tmp_path / "x").exists()


def test_a_mesh_that_does_not_divide_the_model_is_refused(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        _, spec = written("hf-siglip", EXPRESSIBLE["hf-siglip"][0], tmp_path)
    with mesh(1, 1, 8), pytest.raises(RecipeError, match=r"mesh\.model=8: must divide model\.num_heads=4"):
        weights.open_source(spec)


def test_nothing_is_overwritten(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][0], tmp_path)
        with pytest.raises(RecipeError, match="is there already"):
            convert.save(model, "timm", Path(spec.removeprefix("timm:")))
        data = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        with pytest.raises(RecipeError, match="is there already"):
            convert.save_workdir(model, tmp_path, "name", data, "origin")


def test_a_bare_file_of_timms_asks_for_what_no_tensor_tells(mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model, spec = written("timm-vit", EXPRESSIBLE["timm-vit"][0], tmp_path)
        path = Path(spec.removeprefix("timm:"))
        path.with_suffix(".json").unlink()
        arrays = {name: np.array(array) for name, array in open_tensors(path).arrays.items()}
        write_safetensors(path, {k: v.shape for k, v in arrays.items()}, arrays.__getitem__, {})
        with pytest.raises(RecipeError, match=r"model.num_heads: neither .* tell it; give --config.model.num_heads="):
            weights.open_source(spec)
        loaded = convert.load(weights.open_source(spec, overrides={"num_heads": 4}))
        assert_same(loaded, model)


def test_which_gelu_a_bare_file_with_attention_pooling_has_is_asked_for() -> None:
    layout, config = LAYOUTS["timm-vit"], config_of(SEQUENTIAL | BIASES)
    shapes = their_shapes(layout.rules(config, None), weights.our_shapes(config), config)
    with pytest.raises(RecipeError, match=r"model\.mlp: neither .* give --config\.model\.mlp="):
        weights.configuration(layout, Published({}, shapes), {}, {"num_heads": 4})
    known = weights.configuration(layout, Published({}, shapes), {}, {"num_heads": 4, "mlp": "gelu_tanh"})
    assert known.mlp == "gelu_tanh"
    unknown = Published({"model_args": {"act_layer": "quick_gelu"}}, shapes)
    with pytest.raises(RecipeError, match="act_layer='quick_gelu': only 'gelu' and 'gelu_tanh' can be read"):
        weights.configuration(layout, unknown, {}, {"num_heads": 4})


@pytest.mark.parametrize(
    ("processor", "info", "expected"),
    [
        (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": {"shortest_edge": 256},
             "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            {}, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "eval_crop_fraction": 0.875},
        ),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}},
            {}, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "eval_crop_fraction": 1.0, "eval_resize": "square"},
        ),
        ({"size": 224, "feature_extractor_type": "ViTFeatureExtractor"}, {}, SQUARE),
        ({"image_processor_type": "ViTImageProcessor"}, {}, SQUARE),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, {}, SQUARE | {"eval_crop_fraction": 0.875}),
        (
            {"size": 448, "crop_size": 448, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"},
            {}, {"eval_crop_fraction": 1.0},
        ),
        ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 224}}, {}, {}),
        ({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256}, {}, {}),
        (
            {}, {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_pct": 0.9}},
            {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "eval_crop_fraction": 0.9},
        ),
        ({}, {"pretrained_cfg": {"crop_pct": 1, "crop_mode": "squash"}}, SQUARE),
        ({}, {"pretrained_cfg": {"crop_mode": "center"}}, {"eval_crop_fraction": 0.875}),
        ({}, {}, {}),
    ],
    ids=["crop", "both", "int", "bare", "squeezed", "short", "open", "naflex", "timm", "squash", "crop-mode", "none"],
)  # fmt: skip
def test_preprocessing_is_that_of_the_description(processor: dict, info: dict, expected: dict, tmp_path: Path) -> None:
    if processor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert weights.preprocessing(tmp_path, info) == expected


@pytest.mark.parametrize("fraction", [0.875, 1.0])
@pytest.mark.parametrize("resize", ["square", "short_side"])
@pytest.mark.parametrize("library", ["hf", "timm"])
def test_preprocessing_is_read_as_it_was_written(
    fraction: float, resize: str, library: str, tmp_path: Path, mesh: MeshFactory
) -> None:
    data = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "eval_crop_fraction": fraction, "eval_resize": resize}
    path = tmp_path / ("model" if library == "hf" else "model.safetensors")
    with mesh():
        layout = "hf-vit" if library == "hf" else "timm-vit"
        model = random_model(config_of(EXPRESSIBLE[layout][0]))  # of 32 pixels, which are cut out of 37
        convert.save(model, library, path, data)
        found = weights.open_source(f"{library}:{path}").preprocessing
    assert round(32 / found.pop("eval_crop_fraction")) == round(32 / data.pop("eval_crop_fraction"))
    assert {"eval_resize": "short_side"} | found == data


def test_a_run_is_written_with_its_moving_average(mesh: MeshFactory, tmp_path: Path) -> None:
    recipe = Recipe(
        name="t", total_steps=2, batch_size=8, model=config_of({}), optim=OptimConfig(ema_decay=0.9),
        data=DataConfig(train="digits", validation="digits", std=(0.25, 0.5, 0.75)),
    )  # fmt: skip
    with mesh(1, 2, 2):
        state = jax.jit(lambda: step.init_state(recipe))()
        state = dataclasses.replace(state, ema=random_model(recipe.model))
        open_workdir(tmp_path / "run", recipe, {})
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", recipe)
        checkpoints.save(1, state)
        checkpoints.wait()
    assert read_recipe(tmp_path / "run") == recipe
    with mesh(2, 1, 1):  # another mesh
        model, found = convert.load_workdir(str(tmp_path / "run"))
        assert found == recipe
        assert_same(model, state.ema)


def test_the_program_converts_there_and_back(tmp_path: Path, mesh: MeshFactory, capsys: pytest.CaptureFixture) -> None:
    with mesh():
        model, spec = written("hf-siglip", EXPRESSIBLE["hf-siglip"][0], tmp_path)
    statistics = ["--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(0.25,0.5,0.75)"]
    work = tmp_path / "work"
    with pytest.raises(RecipeError, match=r"data\.eval_crop_fraction: no file tells it; give it, as in --config\.data"):
        program.run(["--from", spec, "--to", str(work), *statistics])
    statistics += ["--config.data.eval_crop_fraction=0.8", "--config.data.eval_resize=square"]
    program.run(["--from", spec, "--to", str(work), *statistics, "--config.model.matmul=bf16"])
    program.run(["--from", str(work), "--to", f"hf:{tmp_path / 'again'}"])
    output = capsys.readouterr().out
    assert "read as hf-siglip" in output
    assert "written as hf-siglip" in output
    recipe = read_recipe(work)
    assert recipe.data.std == (0.25, 0.5, 0.75)
    assert (recipe.data.eval_crop_fraction, recipe.data.eval_resize) == (0.8, "square")
    assert recipe.model == dataclasses.replace(model.config, matmul="bf16")
    first, again = (
        open_tensors(path / "model.safetensors").arrays for path in (tmp_path / "model", tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert weights.open_source(f"hf:{tmp_path / 'again'}").preprocessing == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.5, 0.75),
        "eval_crop_fraction": 0.8,  # 32 of 40 pixels
        "eval_resize": "square",
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--from: give it"),
        (["--from", "hf:x"], "--to: give it"),
        (["--from", "hf:x", "--to", "y", "--config.model.depht=2"], "--config.model.depht=2: not a flag"),
        (["--from", "hf:x", "--to", "y", "--config.model.depth=two"], "--config.model.depth=two: needs an integer"),
        (["--from", "hf:x", "--to", "y", "--config.data.mean=1"], "--config.data.mean=1: needs numbers"),
        (["--from", "npz:nowhere.npz", "--to", "y"], "nowhere.npz: no such file"),
        (["--from", "hf:nowhere/at/all", "--to", "y"], "nowhere/at/all: no such file"),
        (["--from", "nowhere", "--to", "y"], "nowhere: holds no recipe.json"),
        (["--from", "jax:x", "--to", "y"], "jax:x: holds no recipe.json"),
        (["--from", "hf:runs/no such", "--to", "y"], "runs/no such: no such folder, and not from the hub"),
    ],
)
def test_a_mistake_is_answered_in_one_line(args: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        program.run(args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_script_exits_with_status_2_and_one_line() -> None:
    command = [sys.executable, "launch/convert.py", "--from", "npz:nowhere.npz", "--to", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: nowhere.npz: no such file or folder"
