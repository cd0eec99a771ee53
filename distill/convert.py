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
from jax.sharding import get_mesh

from distill.layouts import LAYOUTS
from distill.layouts.tables import Layout, Rule, expand, read, their_shapes, write
from distill.tensors import write_npz, write_safetensors, write_sharded_safetensors
from distill.weights import METADATA, Source, checked_rules
from vit22b import frozen
from vit22b.checkpoint import Checkpoints
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError, check
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.sharding import concrete
from vit22b.workdir import open_workdir, write_json

SUFFIXES = {"hf": "", "timm": ".safetensors", "npz": ".npz"}  # of files of each library; "": it has folders


def load(source: Source, dtype: Any = jnp.float32) -> ViT:
    """The model on the mesh in force, each device's part read straight from the files. Parameters are of `dtype`."""
    model = concrete(abstract_model(source.config), get_mesh())
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
    if name is not None:
        check(name in LAYOUTS, "--layout", name, f"choose one of {', '.join(LAYOUTS)}")
        LAYOUTS[name].check_expresses(config)
        return LAYOUTS[name]
    fitting = [layout for layout in LAYOUTS.values() if expresses(layout, config)]
    for layout in fitting:
        if layout.name.startswith(f"{library}-"):
            return layout
    names = ", ".join(each for each in LAYOUTS if each.startswith(f"{library}-"))
    able = [f"{each}:" for each in SUFFIXES if any(o.name.startswith(f"{each}-") for o in fitting)]
    remedy = f"use {' or '.join([*able, 'stablehlo:'])}"
    raise RecipeError(f"--to {library}: none of {names} has such a model (--layout NAME says why); {remedy}")


def expresses(layout: Layout, config: ModelConfig) -> bool:
    try:
        layout.check_expresses(config)
    except RecipeError:
        return False
    return True


def save(
    model: ViT, library: str, path: Path, data: Mapping[str, Any] | None = None, layout_name: str | None = None
) -> Layout:
    """Writes the model in the layout that fits: a folder for 'hf', one file for 'timm' (with a .json) and 'npz'.

    `data`: fields of `DataConfig` on preprocessing, which 'hf' and 'timm' describe too. Raises `RecipeError` where the
    library has no such model, a parameter of ours has no place in it and is not zero, or the path is taken, or has a
    suffix that it could not be read by.
    """
    check_suffix(library, path)
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
            description["pretrained_cfg"] = {
                "mean": list(data["mean"]),
                "std": list(data["std"]),
                "crop_pct": data["eval_crop_fraction"],
                "crop_mode": "squash" if data.get("eval_resize") == "square" else "center",
            }
        write_safetensors(path, shapes, value, metadata)
        write_json(path.with_suffix(".json"), description)
    return layout


def check_suffix(library: str, path: Path) -> None:
    """Raises `RecipeError` for a file's name by which it could not be read back."""
    suffix = SUFFIXES[library]
    ok = path.suffix == suffix or not suffix
    check(ok, "--to", f"{library}:{path}", f"needs a file's name with {suffix}, as {library}:mine{suffix}")


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


def load_workdir(name: str) -> tuple[ViT, Recipe]:
    """The model of a run, one of several as RUN@NAME, or of converted weights, on the mesh in force."""
    recipe = frozen.recipe_of("--from", name)
    return frozen.load("--from", name, concrete(abstract_model(recipe.model), get_mesh()), seed=0), recipe


def check_unplaced(rules: list[Rule], parameters: Mapping[str, jax.Array], layout: Layout) -> None:
    """Raises `RecipeError` for a parameter of ours that theirs has no place for and that is not zero."""
    for rule in rules:
        if not rule.theirs and bool(jnp.any(parameters[rule.ours] != 0)):
            raise RecipeError(f"{rule.ours}: is not zero, and {layout.name} has no place for it")


def described_preprocessing(config: ModelConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers' image processors that which resizes and crops as `data` says."""
    size, resized = config.image_size, round(config.image_size / data["eval_crop_fraction"])
    square, cropped = data.get("eval_resize") == "square", resized > config.image_size
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return {
        "image_processor_type": f"{('DeiT' if cropped else 'ViT') if square else 'Bit'}ImageProcessor",
        "do_resize": True,
        "size": {"height": resized, "width": resized} if square else {"shortest_edge": resized},
        **(crop if cropped or not square else {}),
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
    }
