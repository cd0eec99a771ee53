"""Public weights into our models, sharded over the mesh in force, and our models into other libraries' files.

Both directions read the tables in distill/layouts, so that they cannot disagree.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_abstract_mesh, get_mesh, use_abstract_mesh

from distill.layouts import LAYOUTS
from distill.layouts.tables import (
    Layout,
    Published,
    Rule,
    check_tensors,
    check_zeros,
    expand,
    read,
    their_shapes,
    write,
)
from distill.tensors import open_tensors, write_npz, write_safetensors, write_sharded_safetensors
from vit22b.checkpoint import Checkpoints
from vit22b.config import DataConfig, ModelConfig, Recipe, RecipeError
from vit22b.model import ViT
from vit22b.names import named_leaves
from vit22b.sharding import abstract_mesh, check_model_divisibility, concrete
from vit22b.workdir import open_workdir, read_recipe

METADATA = "vit22b"  # key of our own configuration in a safetensors file that we wrote
LIBRARIES = ("hf", "timm", "npz")


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
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise RecipeError(f"{name}: no such folder; to download it run pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
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
        try:
            known = layout.config(published)
        except KeyError as error:
            raise RecipeError(f"{layout.name}: neither config.json nor the tensors have {error}") from error
    known |= overrides
    required = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    required += ["image_size", "patch_size"]
    for name in required:
        if name not in known:
            raise RecipeError(f"model.{name}: neither config.json nor the tensors tell it; give --config.model.{name}=")
    config = ModelConfig(**known)
    config.validate()
    return config


def abstract(config: ModelConfig) -> ViT:
    """Shapes and shardings of a model on the mesh in force, which may be abstract."""
    return jax.eval_shape(lambda: ViT(config, jax.random.key(0)))


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by name. Raises `RecipeError` where a mesh in force does not divide the model."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        with use_abstract_mesh(abstract_mesh((1, 1, 1))):
            return our_shapes(config)
    check_model_divisibility(config, mesh.shape["data"], mesh.shape["model"])
    return {name: leaf.shape for name, leaf in named_leaves(abstract(config)).items()}


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


def load(source: Source, dtype: Any = jnp.float32) -> ViT:
    """The model on the mesh in force, each device's part read straight from the files. Parameters are of `dtype`."""
    model = concrete(abstract(source.config), get_mesh())
    names, structure = named_leaves(model), jax.tree.structure(model)

    def parameter(name: str, leaf: jax.Array) -> jax.Array:
        @functools.cache  # of a replicated parameter each device asks for the same
        def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            index = tuple(slice(*bound) for bound in bounds)
            return read(source.rules, name, index, leaf.shape, source.arrays, source.config).astype(dtype)

        def callback(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return part(tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)))

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, callback)

    return jax.tree.unflatten(structure, [parameter(name, leaf) for name, leaf in names.items()])


def writable_layout(library: str, config: ModelConfig, name: str | None = None) -> Layout:
    """The layout of that name, or the library's first that can express the configuration; raises `RecipeError`."""
    names = [name] if name is not None else [each for each in LAYOUTS if each.startswith(f"{library}-")]
    reasons = []
    for each in names:
        if each not in LAYOUTS:
            raise RecipeError(f"--layout={each}: choose one of {', '.join(LAYOUTS)}")
        try:
            LAYOUTS[each].check_expresses(config)
            return LAYOUTS[each]
        except RecipeError as error:
            reasons.append(str(error))
    raise RecipeError("; ".join(reasons))


def save(
    model: ViT, library: str, path: Path, data: Mapping[str, Any] | None = None, layout_name: str | None = None
) -> Layout:
    """Writes the model in the layout that fits: a folder for 'hf', one file for 'timm' (with a .json) and 'npz'.

    `data`: fields 'mean' and 'std' of `DataConfig`, which 'hf' and 'timm' describe too. Raises `RecipeError` where the
    library has no such model, a parameter of ours has no place in it and is not zero, or the path is taken.
    """
    config = model.config
    layout = writable_layout(library, config, layout_name)
    rules = checked_rules(layout, config, None)
    parameters = named_leaves(model)
    check_unplaced(rules, parameters, layout)
    shapes = their_shapes(rules, {name: leaf.shape for name, leaf in parameters.items()}, config)
    by_name: dict[str, list[tuple[int | None, Rule]]] = {}
    for name, layer, rule in expand(rules, config.depth):
        by_name.setdefault(name, []).append((layer, rule))

    def ours(name: str, layer: int | None) -> np.ndarray:
        return np.asarray(parameters[name] if layer is None else parameters[name][layer])

    def value(name: str) -> np.ndarray:
        return write(by_name[name], shapes[name], ours, config)

    metadata = {"format": "pt", METADATA: json.dumps(dataclasses.asdict(config))}
    description = layout.describe(config)
    beside = [path.with_suffix(".json")] if library == "timm" else []
    for each in (path, *beside):
        if each.exists() and (each.is_file() or any(each.iterdir())):
            raise RecipeError(f"{each}: is there already; nothing is overwritten")
    if library == "hf":
        path.mkdir(parents=True, exist_ok=True)
        write_sharded_safetensors(path, shapes, value, metadata)
        write_json(path / "config.json", description)
        if data is not None:
            write_json(path / "preprocessor_config.json", described_preprocessing(config, data))
        return layout
    path.parent.mkdir(parents=True, exist_ok=True)
    if library == "npz":
        write_npz(path, shapes, value)
    else:
        if data is not None:
            description["pretrained_cfg"] = {"mean": list(data["mean"]), "std": list(data["std"])}
        write_safetensors(path, shapes, value, metadata)
        write_json(path.with_suffix(".json"), description)
    return layout


def save_workdir(model: ViT, workdir: Path, name: str, data: Mapping[str, Any], origin: str) -> None:
    """Writes the model as a run's folder does: recipe.json, and a checkpoint of step 0 without optimizer state.

    `data`: fields of `DataConfig`; `origin` says in recipe.json where the weights come from. Raises `RecipeError` where
    the folder holds anything.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise RecipeError(f"{workdir}: is there already; nothing is overwritten")
    recipe = Recipe(
        name=name,
        total_steps=1,
        batch_size=get_mesh().size,
        model=model.config,
        data=DataConfig(**{"train": "synthetic", "validation": "synthetic"} | dict(data)),
    )
    recipe.validate()
    open_workdir(workdir, recipe, {"weights": origin})
    checkpoints = Checkpoints(workdir / "checkpoints", recipe)
    checkpoints.save(0, {"model": model})
    checkpoints.wait()


def load_workdir(workdir: Path) -> tuple[ViT, Recipe]:
    """The model of a run, or of converted weights, on the mesh in force."""
    recipe = read_recipe(workdir)
    return Checkpoints(workdir / "checkpoints", recipe).restore_model(
        concrete(abstract(recipe.model), get_mesh())
    ), recipe


def check_unplaced(rules: list[Rule], parameters: Mapping[str, jax.Array], layout: Layout) -> None:
    """Raises `RecipeError` for a parameter of ours that theirs has no place for and that is not zero."""
    for rule in rules:
        if not rule.theirs and bool(jnp.any(parameters[rule.ours] != 0)):
            raise RecipeError(f"{rule.ours}: is not zero, and {layout.name} has no place for it")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def preprocessing(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """'mean' and 'std', and 'eval_crop_fraction' where images are cropped, as fields of `DataConfig`."""
    processor, known = read_json(folder / "preprocessor_config.json"), {}
    cfg = info.get("pretrained_cfg") or {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value = processor.get(theirs, cfg.get(ours))
        if value is not None:
            known[ours] = tuple(float(v) for v in value)
    resized, cropped = processor.get("size") or {}, processor.get("crop_size") or {}
    fraction = cfg.get("crop_pct")
    if "shortest_edge" in resized and "height" in cropped:
        fraction = cropped["height"] / resized["shortest_edge"]
    return known | ({"eval_crop_fraction": float(fraction)} if fraction else {})


def described_preprocessing(config: ModelConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
    }
