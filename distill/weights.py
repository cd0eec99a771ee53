"""Weights of other libraries before any is read: where they lie, their layout, and the configuration of ours."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import get_abstract_mesh, use_abstract_mesh

from distill.layouts import LAYOUTS
from distill.layouts.tables import Layout, Published, Rule, check_tensors, check_zeros, their_shapes
from distill.tensors import open_tensors
from vit22b.errors import RecipeError
from vit22b.model import abstract_model
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.sharding import abstract_mesh

METADATA = "vit22b"  # key of our own configuration in a safetensors file that we wrote
LIBRARIES = ("hf", "timm", "npz")
# What config.json of transformers has under the same meaning as a field of `ModelConfig`, which may stand in for it.
FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp_dim",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_epsilon",
    "qkv_bias": "qkv_bias",
    "proj_bias": "proj_bias",
    "mlp_bias": "mlp_bias",
    "attention_bias": "qkv_bias",
    "layerscale_value": "layer_scale",
    "layer_scale_init_value": "layer_scale",
    "num_register_tokens": "num_registers",
    "rope_theta": "rope_base",
}
PREPROCESSING = ("mean", "std", "eval_crop_fraction", "eval_resize")  # fields of `DataConfig`
# Those that cannot be guessed where no file tells them; the examples are what big_vision does for most of its models.
ASKED = {"mean": "(0.5,0.5,0.5)", "std": "(0.5,0.5,0.5)", "eval_crop_fraction": "0.875"}
SHORT_SIDE = ("CLIP", "Bit")  # image processors of transformers whose size, as a mere number, is that of the short side


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights of another library, none of which has been read yet."""

    layout: Layout
    config: ModelConfig
    arrays: Mapping[str, np.ndarray]
    rules: list[Rule]
    preprocessing: dict[str, Any]  # fields of `DataConfig`, as far as they are known


def open_source(spec: str, layout: str | None = None, overrides: dict[str, Any] | None = None) -> Source:
    """What `spec` names: 'hf:FOLDER_OR_ID', 'timm:FILE_OR_FOLDER_OR_ID' or 'npz:FILE', as `layout` or what fits it.

    `overrides` are fields of `ModelConfig` that win over the description. Raises `RecipeError` for weights of no known
    layout, a configuration that is not known in full, and tensors that are missing, unexpected, of another shape, or
    have no place in our model.
    """
    library, name = split(spec)
    path = fetch(library, name)
    tensors = open_tensors(path)
    folder = path if path.is_dir() else path.parent
    info = read_json(folder / "config.json") if library != "npz" else {}
    if path.suffix == ".safetensors" and path.with_suffix(".json").exists():
        info = read_json(path.with_suffix(".json"))
    published = Published(info, {key: array.shape for key, array in tensors.arrays.items()})
    found = choose(library, published, layout)
    arrays = {key: tensors.arrays[key] for key in published.shapes if not key.startswith(found.others)}
    published = Published(info, {key: published.shapes[key] for key in arrays})
    config = configuration(found, published, tensors.metadata, overrides or {})
    rules = checked_rules(found, config, published)
    check_zeros(rules, arrays, config)
    return Source(layout=found, config=config, arrays=arrays, rules=rules, preprocessing=preprocessing(folder, info))


def split(spec: str) -> tuple[str, str]:
    """'hf:NAME' as its two parts."""
    library, _, name = spec.partition(":")
    if library not in LIBRARIES or not name:
        raise RecipeError(f"{spec}: needs hf:FOLDER_OR_ID, timm:FILE_OR_FOLDER_OR_ID or npz:FILE")
    return library, name


def fetch(library: str, name: str) -> Path:
    """The local file or folder; what is none is taken for a repository of the Hugging Face hub and downloaded."""
    path = Path(name)
    if path.exists():
        return path
    if library == "npz" or path.suffix or name.count("/") != 1:
        raise RecipeError(f"{name}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise RecipeError(f"{name}: no such folder; to download it run pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"{name}: no such folder, and not from the hub ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({error})") from error


def choose(library: str, published: Published, name: str | None) -> Layout:
    """The layout of that name, or the first that recognises the weights."""
    names = [each for each in LAYOUTS if each.startswith(f"{library}-")]
    if name is not None:
        if name not in names:
            raise RecipeError(f"--layout={name}: choose one of {', '.join(names)}")
        return LAYOUTS[name]
    for each in names:
        if LAYOUTS[each].recognises(published):
            return LAYOUTS[each]
    kind = published.info.get("model_type", "no model_type")
    raise RecipeError(f"weights of no known layout ({kind} in config.json); --layout takes {', '.join(names)}")


def configuration(
    layout: Layout, published: Published, metadata: dict[str, str], overrides: dict[str, Any]
) -> ModelConfig:
    """Our configuration: as we wrote it into the file ourselves, or from the description and the shapes."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    if METADATA in metadata:
        known = {name: value for name, value in json.loads(metadata[METADATA]).items() if name in names}
    else:
        info = {key: overrides[ours] for key, ours in FIELDS.items() if ours in overrides} | published.info
        try:
            known = layout.config(Published(info, published.shapes))
        except KeyError as error:
            ours = FIELDS.get(error.args[0])
            remedy = f"; give --config.model.{ours}=" if ours else ""
            raise RecipeError(f"{layout.name}: neither config.json nor the tensors have {error}{remedy}") from error
    known |= overrides
    required = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    required += ["image_size", "patch_size", *(name for name, value in known.items() if value is None)]
    for name in required:
        if known.get(name) is None:
            raise RecipeError(f"model.{name}: neither config.json nor the tensors tell it; give --config.model.{name}=")
    config = ModelConfig(**known)
    config.validate()
    return config


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by name. Raises `RecipeError` where a mesh in force does not divide the model."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        with use_abstract_mesh(abstract_mesh((1, 1, 1))):
            return our_shapes(config)
    config.check_mesh(mesh.shape["data"], mesh.shape["model"])
    return {name: leaf.shape for name, leaf in named_leaves(abstract_model(config)).items()}


def checked_rules(layout: Layout, config: ModelConfig, published: Published | None) -> list[Rule]:
    """The layout's rules, which have a place for each of our parameters and, if published, each tensor of theirs."""
    rules, ours = layout.rules(config, published), our_shapes(config)
    placed = {rule.ours for rule in rules if rule.ours}
    unknown = sorted(placed - ours.keys()) + sorted(ours.keys() - placed)
    if unknown:
        raise RecipeError(f"{layout.name}: has no place for {', '.join(unknown)} with this configuration")
    if published is not None:
        check_tensors(rules, their_shapes(rules, ours, config), published.shapes, config)
    return rules


def preprocessing(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Those of `PREPROCESSING` that the files of transformers or timm tell."""
    processor = read_json(folder / "preprocessor_config.json")
    known: dict[str, Any] = {}
    cfg = info.get("pretrained_cfg") or {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value = processor.get(theirs, cfg.get(ours))
        if value is not None:
            known[ours] = tuple(float(v) for v in value)
    if processor:
        return known | _resizing(processor)
    if cfg:
        known["eval_crop_fraction"] = float(cfg.get("crop_pct") or 0.875)  # timm's default
        known |= {"eval_resize": "square"} if cfg.get("crop_mode") == "squash" else {}
    return known


def _resizing(processor: dict[str, Any]) -> dict[str, Any]:
    """What a processor of transformers does before it normalises; {} where its description leaves that open."""
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    size, crop, cropped = (processor.get(name) for name in ("size", "crop_size", "do_center_crop"))
    square = not kind.startswith(SHORT_SIDE)
    if cropped is None:
        cropped = not square  # the classes' defaults
    if isinstance(size, dict):
        square = "shortest_edge" not in size
        size = size.get("height", size.get("shortest_edge"))
    if isinstance(crop, dict):
        crop = crop.get("height")
    resize = {"eval_resize": "square"} if square else {}
    if cropped and size and crop:
        return resize | {"eval_crop_fraction": crop / size}
    if not cropped and square and "max_num_patches" not in processor:  # NaFlex's images have many shapes
        return resize | {"eval_crop_fraction": 1.0}
    return {}
