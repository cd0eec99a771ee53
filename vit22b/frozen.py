"""Models that only compute: teachers, and encoders that are probed."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, get_mesh
from jax.sharding import PartitionSpec as P

from vit22b import sharding
from vit22b.checkpoint import restore_model
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.matmul import DTYPES
from vit22b.model import ViT
from vit22b.model_config import ModelConfig, resized
from vit22b.names import path_name
from vit22b.optim import MATRICES
from vit22b.workdir import read_fields, read_recipe

RANDOM = "random:"  # before a recipe, in the place of a work directory: an untrained model


def frozen_config(trained: ModelConfig, matmul: str) -> ModelConfig:
    """As it computes here. The image size stays that of its positions, which other grids are resampled from."""
    return dataclasses.replace(
        trained,
        matmul=matmul,
        attention="auto",
        kernels="auto",
        remat="none",
        overlap="none",
        stochastic_depth=0.0,
        scan_unroll=trained.depth,
    )


def placed(abstract: ViT, replicated: bool = False) -> ViT:
    """The abstract model, matrices in the dtype of its matmuls, on the mesh in force; `replicated`: not over 'data'."""

    def place_leaf(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        matrix = path_name(path).split("/")[-1] in MATRICES
        spec = sharding.spec_of(leaf)
        if replicated:
            spec = P(*(None if axis == "data" else axis for axis in spec))
        dtype = DTYPES[abstract.config.matmul] if matrix else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(get_mesh(), spec))

    return jax.tree_util.tree_map_with_path(place_leaf, abstract)


def run_and_member(name: str) -> tuple[Path, str]:
    """The work directory that 'RUN' or 'RUN@MEMBER' names, and which of the models trained in it; '': the first."""
    folder, at, member = name.rpartition("@")
    return (Path(folder), member) if at and not Path(name).exists() else (Path(name), "")


def members(folder: Path) -> tuple[str, ...]:
    """The names of the models that were trained in a work directory; raises `RecipeError`."""
    return ("student", *read_fields(folder).get("distill.more_students", ()))


def recipe_of(field: str, name: str) -> Recipe:
    """That of a work directory, with the model of the member named, or of `random:RECIPE.py[:ARGUMENT]`.

    Raises `RecipeError`, naming `field`.
    """
    if not name.startswith(RANDOM):
        folder, member = run_and_member(name)
        try:
            recipe, names = read_recipe(folder), members(folder)
        except RecipeError as error:
            raise RecipeError(f"{field}={error}") from error
        check(member in ("", *names), field, name, f"the models of {folder} are {', '.join(names)}")
        further = member in names[1:]
        return dataclasses.replace(recipe, model=resized(recipe.model, member)) if further else recipe
    path, _, argument = name.removeprefix(RANDOM).partition(":")
    check(Path(path).is_file(), field, name, f"there is no recipe {path}")
    try:
        get_config = runpy.run_path(path)["get_config"]
        recipe = get_config(argument) if argument else get_config()
    except RecipeError:
        raise
    except Exception as error:  # whatever the recipe's own code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RecipeError(f"{field}={name}: its get_config({argument!r}) fails ({reason}); mend it") from error
    check(isinstance(recipe, Recipe), field, name, "get_config() must return a Recipe of vit22b/config.py")
    return recipe


def load(field: str, name: str, abstract: ViT, seed: int) -> ViT:
    """The model of a work directory, or of `random:` as it is before training, placed as `abstract`.

    Raises `RecipeError`, naming `field`.
    """

    def create() -> ViT:
        model = ViT(abstract.config, jax.random.key(seed))
        return jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), model, abstract)

    if name.startswith(RANDOM):
        return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    folder, member = run_and_member(name)
    try:
        return restore_model(folder / "checkpoints", abstract, "" if member == "student" else member)
    except RecipeError as error:
        raise RecipeError(f"{field}={name}: {error}") from error
