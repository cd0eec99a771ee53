"""Frozen teachers beside the students: loaded, placed, and asked for what a batch is annotated with.

They are arguments of a program of their own, which runs on each batch before the train step does: no optimizer, no
gradient, no checkpoint knows of them.
"""

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import get_mesh, reshard

from distill import cache
from distill.config import DistillRecipe
from vit22b import data, frozen, sharding
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError, check
from vit22b.flops import forward_flops
from vit22b.frozen import RANDOM, frozen_config, placed
from vit22b.hardware import multiplies_fp8
from vit22b.matmul import DTYPES
from vit22b.mix import mix, normalize
from vit22b.model import Output, ViT, abstract_model
from vit22b.model_config import ModelConfig
from vit22b.objective import Batch
from vit22b.sharding import BATCH
from vit22b.sources import Source
from vit22b.step import compile_eval_step, step_key
from vit22b.train import evaluate, place
from vit22b.workdir import read_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model. `config` is as it computes here, in the teachers' dtype; its image size is its positions'."""

    name: str
    config: ModelConfig
    data: DataConfig  # of which mean and std count
    model: ViT


@functools.partial(jax.tree_util.register_dataclass, data_fields=["models", "statistics"], meta_fields=[])
@dataclasses.dataclass
class Frozen:
    """What the annotating program takes beside the batch; `statistics`: of each teacher's features."""

    models: list[ViT]
    statistics: list[dict[str, tuple[jax.Array, jax.Array]]]  # 'summary' and 'patches': mean and deviation, (K,)


def load(recipe: DistillRecipe) -> list[Teacher]:
    """The recipe's teachers, on the mesh in force. Raises `RecipeError`."""
    return [load_one(name, recipe, index) for index, name in enumerate(recipe.distill.teachers)]


def load_one(name: str, recipe: DistillRecipe, index: int) -> Teacher:
    trained, normal = read_teacher(name)
    config = frozen_config(trained, recipe.distill.matmul)
    check_teacher(name, config, recipe, index)
    abstract = placed(abstract_model(config), replicated=recipe.distill.sharding == "replicated")
    return Teacher(name=name, config=config, data=normal, model=frozen.load(name, abstract, index))


def read_teacher(name: str) -> tuple[ModelConfig, DataConfig]:
    """The architecture of a teacher, and how its images are normalised; raises `RecipeError`."""
    recipe = frozen.recipe_of("distill.teachers", name)
    return recipe.model, recipe.data


def fingerprint(name: str) -> str:
    """What a resumed run's teacher must have in common with that of its start: recipe, step, sizes of the files."""
    if name.startswith(RANDOM):
        return name
    folder = Path(name)
    files = sorted(
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in (folder / "checkpoints").rglob("*")
        if path.is_file()
    )
    return hashlib.sha256(json.dumps([read_recipe(folder).flat(), files]).encode()).hexdigest()[:16]


def check_teacher(name: str, config: ModelConfig, recipe: DistillRecipe, index: int) -> None:
    """Raises `RecipeError` unless the teacher has what the recipe wants of it."""
    distill, size = recipe.distill, recipe.teacher_sizes()[index]
    device = get_mesh().devices.flat[0]
    ok = distill.matmul != "fp8" or multiplies_fp8(device)
    check(ok, "distill.matmul", "'fp8'", f"{device.device_kind} has no fp8 matmuls; use 'bf16'")
    p = config.patch_size
    check(size % p == 0, "distill.image_sizes", size, f"{name} has patches of {p}; try {max(size // p, 1) * p}")
    if distill.match == "logits":
        found = f"{name} has {config.num_classes} classes"
        check(config.num_classes == recipe.model.num_classes, "model.num_classes", recipe.model.num_classes, found)
    else:
        width = distill.widths[index]
        check(config.width == width, "distill.widths", width, f"{name} has features of {config.width}")
        found = f"{name} pools by it, to twice its width: only classes can be learned from it"
        check(config.pooled_width == width, "model.pool", repr(config.pool), found)
    own = Recipe(name="teacher", total_steps=1, batch_size=recipe.batch_size, model=config, data=recipe.data)
    try:
        sharding.check_divisibility(own, tuple(get_mesh().shape.values()))
    except RecipeError as error:
        raise RecipeError(f"distill.teachers={name}: {error}") from error


class Teaching:
    """What teachers make of batches: a `Preparation` of vit22b/train.py."""

    def __init__(self, recipe: DistillRecipe, teachers: list[Teacher]) -> None:
        self._recipe, self._teachers = recipe, teachers
        self._frozen = Frozen([teacher.model for teacher in teachers], [as_they_are(t.config) for t in teachers])
        self.bytes_per_device = sharding.bytes_per_device(self._frozen.models)
        sized = (
            dataclasses.replace(t.config, image_size=size)
            for t, size in zip(teachers, recipe.teacher_sizes(), strict=True)
        )
        self.flops = sum(forward_flops(config) for config in sized)
        self._annotate = jax.jit(functools.partial(annotate, recipe, teachers))
        self._record = jax.jit(functools.partial(record, recipe, teachers))

    def __call__(self, batch: Batch, step: int) -> Batch:
        return self._annotate(self._frozen, batch, jnp.int32(step))

    def record(self, batch: Batch, step: int) -> Batch:
        """What distill/cache.py stores of a batch."""
        return self._record(self._frozen, batch, jnp.int32(step))

    def find_statistics(self, source: Source) -> None:
        """Mean and deviation of the teachers' features over the first training batches, the same at every start."""
        if self._recipe.distill.match != "features":
            return
        batches = data.train_batches(source, self._recipe, 0, jax.process_index(), jax.process_count())
        sums = jax.jit(functools.partial(feature_sums, self._recipe, self._teachers))
        total = None
        for step in range(self._recipe.distill.statistics_batches):
            found = sums(self._frozen, place(next(batches)), jnp.int32(step))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        batches.close()
        assert total is not None
        self._frozen = Frozen(self._frozen.models, [{k: moments(*s) for k, s in each.items()} for each in total])

    def accuracy(self, source: Source, batches: int) -> list[dict[str, float]]:
        """Each teacher's metrics on the first batches of a validation set, at its own image size."""
        found = []
        for teacher, size in zip(self._teachers, self._recipe.teacher_sizes(), strict=True):
            config = dataclasses.replace(teacher.config, image_size=size)
            seen = dataclasses.replace(self._recipe.data, mean=teacher.data.mean, std=teacher.data.std)
            own = Recipe(name="teacher", total_steps=1, batch_size=self._recipe.batch_size, model=config, data=seen)
            found.append(evaluate(own, compile_eval_step(own, teacher.model), teacher.model, source, batches))
        return found


class CachedTeaching:
    """The same from a cache: a `Preparation`, too."""

    bytes_per_device = flops = 0

    def __init__(self, recipe: DistillRecipe, reader: cache.Reader) -> None:
        self._period, self._reader = recipe.distill.cached_steps, reader
        self._annotate = jax.jit(functools.partial(annotate_from_cache, recipe))

    def __call__(self, batch: Batch, step: int) -> Batch:
        return self._annotate(batch, place(self._reader(step)), jnp.int32(step % self._period))


def annotate(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
    """A batch of the input pipeline as `Distillation.batch` describes it; `step` decides what is mixed how."""
    seen, targets = mixed(recipe, batch, step)
    return for_student(recipe, seen, targets) | said(recipe, teachers, frozen, seen)


def annotate_from_cache(recipe: DistillRecipe, batch: Batch, stored: Batch, step: jax.Array) -> Batch:
    """The same with what `record` gave for that step."""
    out = for_student(recipe, *mixed(recipe, batch, step))
    if recipe.distill.match == "features":
        return out | stored
    count = recipe.model.num_classes
    spread = jax.shard_map(
        lambda classes, log_probs: cache.logits_of(classes, log_probs, count),
        in_specs=(BATCH, BATCH),
        out_specs=BATCH,
        check_vma=False,
    )
    numbers = range(len(recipe.distill.teachers))
    return out | {f"logits_{i}": spread(stored[f"classes_{i}"], stored[f"log_probs_{i}"]) for i in numbers}


def record(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
    """The arrays of `cache.Layout` for a batch of the input pipeline."""
    seen, _ = mixed(recipe, batch, step)
    out = said(recipe, teachers, frozen, seen)
    if recipe.distill.match == "features":
        return out
    stored = {}
    for i in range(len(teachers)):
        stored[f"classes_{i}"], stored[f"log_probs_{i}"] = cache.most_probable(out[f"logits_{i}"], recipe.top_k())
    return stored


def for_student(recipe: DistillRecipe, seen: Batch, targets: jax.Array) -> Batch:
    with jax.named_scope("input"):
        image = normalize(resized(seen["image"], recipe.model.image_size), recipe.data)
    return {"image": image.astype(DTYPES[recipe.model.matmul]), "targets": targets}


def said(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, seen: Batch) -> Batch:
    """Logits, or standardised features, of each teacher."""
    found = {}
    for i, output in enumerate(outputs(recipe, teachers, frozen, seen)):
        if recipe.distill.match == "logits":
            found[f"logits_{i}"] = output.logits
            continue
        for name, features in aligned(output, teachers[i].config, recipe).items():
            mean, deviation = frozen.statistics[i][name]
            found[f"{name}_{i}"] = ((features - mean) / deviation).astype(jnp.bfloat16)
    return found


def mixed(recipe: DistillRecipe, batch: Batch, step: jax.Array) -> tuple[Batch, jax.Array]:
    """The views, mixed in pairs where the recipe says so, as floats from 0 to 255; and the labels' targets (B, C)."""
    mix_key, _ = jax.random.split(step_key(recipe, step))
    targets = jax.nn.one_hot(batch["label"], recipe.model.num_classes)
    with jax.named_scope("input"):
        image, targets = mix(batch["image"].astype(jnp.float32), targets, mix_key, recipe.data)
    return {"image": image, "teacher_image": batch.get("teacher_image", image)}, targets


def outputs(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, seen: Batch) -> list[Output]:
    """What each teacher says of its view."""
    found = []
    for teacher, model, size in zip(teachers, frozen.models, recipe.teacher_sizes(), strict=True):
        with jax.named_scope("input"):
            images = normalize(resized(seen["teacher_image"], size), teacher.data)
        with jax.named_scope("teacher"):
            found.append(jax.lax.stop_gradient(model(images)))
    return found


def resized(images: jax.Array, size: int) -> jax.Array:
    """(B, V, V, C) at another size, with antialiasing; itself at its own."""
    if images.shape[1] == size:
        return images

    def local(x: jax.Array) -> jax.Array:
        return jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic", antialias=True)

    return jax.shard_map(local, in_specs=BATCH, out_specs=BATCH, check_vma=False)(images)


def aligned(output: Output, config: ModelConfig, recipe: DistillRecipe) -> dict[str, jax.Array]:
    """A teacher's 'summary' (B, K), and its 'patches' (B, T, K) on the student's grid, bilinearly; fp32."""
    num_prefix = config.class_token + config.num_registers
    patches = reshard(output.tokens, BATCH)[:, num_prefix:].astype(jnp.float32)
    _, length, width = patches.shape
    side, grid = math.isqrt(length), recipe.model.grid

    def local(x: jax.Array) -> jax.Array:
        square = x.reshape(x.shape[0], side, side, width)
        square = jax.image.resize(square, (x.shape[0], grid, grid, width), "linear", antialias=True)
        return square.reshape(x.shape[0], grid**2, width)

    if side != grid:
        patches = jax.shard_map(local, in_specs=BATCH, out_specs=BATCH, check_vma=False)(patches)
    return {"summary": output.pooled, "patches": patches}


def feature_sums(
    recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, step: jax.Array
) -> list[dict[str, tuple[jax.Array, jax.Array, jax.Array]]]:
    """Number, sum and sum of squares of each feature of each teacher."""
    seen, _ = mixed(recipe, batch, step)

    def sums(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        dims = tuple(range(x.ndim - 1))
        return jnp.float32(math.prod(x.shape[:-1])), jnp.sum(x, axis=dims), jnp.sum(jnp.square(x), axis=dims)

    found = outputs(recipe, teachers, frozen, seen)
    return [
        {name: sums(x) for name, x in aligned(output, teacher.config, recipe).items()}
        for output, teacher in zip(found, teachers, strict=True)
    ]


def as_they_are(config: ModelConfig) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Statistics that change nothing."""
    return {name: (jnp.zeros(config.width), jnp.ones(config.width)) for name in ("summary", "patches")}


def moments(count: jax.Array, total: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation; 1 for what does not vary."""
    mean = total / count
    variance = jnp.maximum(squares / count - jnp.square(mean), 0.0)
    return mean, jnp.where(variance > 1e-12, jnp.sqrt(variance), 1.0)
