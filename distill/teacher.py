"""Frozen teachers beside the students: who they are, checked and loaded onto the mesh. What they do: teaching.py."""

import dataclasses
import hashlib
import json
from typing import Any

from jax.sharding import get_mesh

from distill.config import DistillRecipe
from vit22b import frozen, sharding
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError, check
from vit22b.fingerprint import COMPUTED, digest
from vit22b.frozen import RANDOM, frozen_config, placed
from vit22b.hardware import multiplies_fp8
from vit22b.memory import check_parameter_memory
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig

FIELD = "distill.teachers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model. `config` is as it computes here, in the teachers' dtype; its image size is its positions'."""

    name: str
    config: ModelConfig
    data: DataConfig  # of which mean and std count
    model: ViT


def resolved(recipe: DistillRecipe) -> DistillRecipe:
    """The recipe with each teacher's image size, and how it sees images in evaluation: its own, where none is given.

    Raises `RecipeError` where a teacher is none.
    """
    distill, own = recipe.distill, [frozen.recipe_of(FIELD, name) for name in recipe.distill.teachers]
    sizes = distill.image_sizes or tuple(each.model.image_size for each in own)
    fractions = distill.eval_crop_fractions or tuple(each.data.eval_crop_fraction for each in own)
    resizes = distill.eval_resizes or tuple(each.data.eval_resize for each in own)
    changed = dataclasses.replace(distill, image_sizes=sizes, eval_crop_fractions=fractions, eval_resizes=resizes)
    return dataclasses.replace(recipe, distill=changed)


def load(recipe: DistillRecipe) -> list[Teacher]:
    """The teachers of a resolved recipe, on the mesh in force. Raises `RecipeError`, before anything is allocated."""
    distill, configs, data, abstract = recipe.distill, [], [], []
    for index, name in enumerate(distill.teachers):
        trained = frozen.recipe_of(FIELD, name)
        configs.append(frozen_config(trained.model, distill.matmul))
        data.append(trained.data)
        check_teacher(name, configs[-1], recipe, index)
        abstract.append(placed(abstract_model(configs[-1]), replicated=distill.sharding == "replicated"))
    check_parameter_memory(abstract, FIELD, distill.teachers, distill.matmul)
    return [
        Teacher(name=name, config=config, data=of_data, model=frozen.load(FIELD, name, to, seed))
        for seed, (name, config, of_data, to) in enumerate(zip(distill.teachers, configs, data, abstract, strict=True))
    ]


def fingerprint(teacher: Teacher) -> str:
    """Of what decides what a teacher says of an image that lies on the device: all but fields of the students' recipe.

    It is the same for any sharding, and whichever checkpoint file of these parameters was read. Of the architecture
    only what is not the default counts, so that a new field changes nothing.
    """
    if teacher.name.startswith(RANDOM):
        return teacher.name
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    fields: dict[str, Any] = {
        name: value
        for name, value in dataclasses.asdict(teacher.config).items()
        if value != defaults[name] and name not in (*COMPUTED, "matmul")  # distill.matmul says how it computes here
    }
    seen = [list(map(float, values)) for values in (teacher.data.mean, teacher.data.std)]
    found = json.dumps([fields, seen, digest(teacher.model)], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def check_teacher(name: str, config: ModelConfig, recipe: DistillRecipe, index: int) -> None:
    """Raises `RecipeError` unless the teacher has what the recipe wants of it."""
    distill, size = recipe.distill, recipe.distill.image_sizes[index]
    device = get_mesh().devices.flat[0]
    ok = distill.matmul != "fp8" or multiplies_fp8(device)
    check(ok, "distill.matmul", "'fp8'", f"{device.device_kind} has no fp8 matmuls; use 'bf16'")
    p = config.patch_size
    check(size % p == 0, "distill.image_sizes", size, f"{name} has patches of {p}; try {max(size // p, 1) * p}")
    if distill.match == "logits":
        classes = config.num_classes
        remedy = f"has {classes} classes; give model.num_classes={classes}, or match features (distill.match)"
        check(classes == recipe.model.num_classes, FIELD, name, remedy)
    else:
        width = distill.widths[index]
        check(config.width == width, "distill.widths", width, f"{name} has features of {config.width}")
        found = f"pools to twice its width (model.pool={config.pool!r}): only classes can be learned from it"
        check(config.pooled_width == width, FIELD, name, found)
    own = Recipe(name="teacher", total_steps=1, batch_size=recipe.batch_size, model=config, data=recipe.data)
    try:
        sharding.check_divisibility(own, tuple(get_mesh().shape.values()))
    except RecipeError as error:
        raise RecipeError(f"{FIELD}={name}: {error}") from error
