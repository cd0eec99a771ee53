"""What frozen teachers make of batches, computed beside the students or read from a cache.

They are arguments of a program of their own, which runs on each batch before the train step does: no optimizer, no
gradient, no checkpoint knows of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, get_mesh
from jax.sharding import PartitionSpec as P

from distill import cache, top_classes
from distill.config import DistillRecipe
from distill.features import Moments, aligned, as_they_are, batch_moments
from distill.teacher import Teacher
from vit22b import data, sharding
from vit22b.config import Recipe
from vit22b.flops import forward_flops
from vit22b.matmul import DTYPES
from vit22b.mix import mix, normalize
from vit22b.model import Output, ViT
from vit22b.objective import Batch
from vit22b.sharding import on_batch
from vit22b.sources import Source
from vit22b.step import compile_eval_step, step_key
from vit22b.train import evaluate, place


@functools.partial(jax.tree_util.register_dataclass, data_fields=["models", "statistics"], meta_fields=[])
@dataclasses.dataclass
class Frozen:
    """What the annotating program takes beside the batch; `statistics`: of each teacher's features."""

    models: list[ViT]
    statistics: list[dict[str, tuple[jax.Array, jax.Array]]]  # 'summary' and 'patches': mean and deviation, (K,)


class Teaching:
    """What teachers make of batches of a resolved recipe: a `Preparation` of vit22b/train.py."""

    def __init__(self, recipe: DistillRecipe, teachers: list[Teacher]) -> None:
        self._recipe, self._teachers = recipe, teachers
        self._frozen = Frozen([teacher.model for teacher in teachers], [as_they_are(t.config) for t in teachers])
        self.bytes_per_device = sharding.bytes_per_device(self._frozen.models)
        sized = (
            dataclasses.replace(t.config, image_size=size)
            for t, size in zip(teachers, recipe.distill.image_sizes, strict=True)
        )
        self.flops = sum(forward_flops(config) for config in sized)
        self._annotate = jax.jit(functools.partial(annotate, recipe, teachers))
        self._record = jax.jit(functools.partial(record, recipe, teachers))
        self._differences = jax.jit(functools.partial(differences, recipe, teachers))

    def __call__(self, batch: Batch, step: int) -> Batch:
        return self._annotate(self._frozen, batch, jnp.int32(step))

    def record(self, batch: Batch, step: int) -> Batch:
        """What distill/cache.py stores of a batch."""
        return self._record(self._frozen, batch, jnp.int32(step))

    def differences(self, batch: Batch, stored: Batch, step: int) -> dict[str, tuple[float, float]]:
        """How far the teachers are from what a cache has of a batch: mean and maximum over its views, by array.

        Of 'logits_I' the total variation of the distributions, 0 to 1; of 'summary_I' and 'patches_I' the mean square
        of what differs, where all that a constant would get wrong is 1.
        """
        found = self._differences(self._frozen, batch, stored, jnp.int32(step))
        return {name: (float(mean), float(most)) for name, (mean, most) in found.items()}

    def find_statistics(self, source: Source) -> None:
        """Mean and deviation of the teachers' features over the first training batches, the same at every start."""
        if self._recipe.distill.match != "features":
            return
        batches = data.train_batches(source, self._recipe, 0, jax.process_index(), jax.process_count())
        of_batch = jax.jit(functools.partial(feature_moments, self._recipe, self._teachers))
        total = [{"summary": Moments(), "patches": Moments()} for _ in self._teachers]
        counts = {"summary": self._recipe.batch_size, "patches": self._recipe.batch_size * self._recipe.model.grid**2}
        for step in range(self._recipe.distill.statistics_batches):
            found = of_batch(self._frozen, place(next(batches)), jnp.int32(step))
            for moments, of_teacher in zip(total, found, strict=True):
                for name, (mean, squares) in of_teacher.items():
                    moments[name].add(counts[name], np.asarray(mean), np.asarray(squares))
        batches.close()
        statistics = [{name: each.result() for name, each in moments.items()} for moments in total]
        self._frozen = Frozen(self._frozen.models, jax.device_put(statistics, NamedSharding(get_mesh(), P())))

    def accuracy(self, source: Source, batches: int) -> list[dict[str, float] | None]:
        """Of each teacher that has the students' classes its metrics, as its own evaluation sees images.

        On evenly spaced images of a validation set, which may lie sorted by class; so many as fill `batches`.
        """
        count = min(len(source), batches * self._recipe.batch_size)
        some = source.only(np.linspace(0, len(source) - 1, count).astype(int), b" evenly spaced")
        found: list[dict[str, float] | None] = []
        distill = self._recipe.distill
        theirs = zip(distill.image_sizes, distill.eval_crop_fractions, distill.eval_resizes, strict=True)
        for teacher, (size, crop, resize) in zip(self._teachers, theirs, strict=True):
            config, normal = dataclasses.replace(teacher.config, image_size=size), teacher.data
            if config.num_classes != self._recipe.model.num_classes:
                found.append(None)
                continue
            seen = dataclasses.replace(
                self._recipe.data, mean=normal.mean, std=normal.std, eval_crop_fraction=crop, eval_resize=resize
            )
            own = Recipe(name="teacher", total_steps=1, batch_size=self._recipe.batch_size, model=config, data=seen)
            found.append(evaluate(own, compile_eval_step(own, teacher.model), teacher.model, some))
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
    temperature = recipe.distill.temperature
    spread = on_batch(functools.partial(top_classes.all_log_probs, num_classes=recipe.model.num_classes))
    # The loss divides logits by the temperature, at which these were stored.
    return out | {
        f"logits_{i}": temperature * spread(*(stored[f"{name}_{i}"] for name in cache.OF_LOGITS))
        for i in range(len(recipe.distill.teachers))
    }


def record(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
    """The arrays of `cache.Layout` for a batch of the input pipeline."""
    seen, _ = mixed(recipe, batch, step)
    out = said(recipe, teachers, frozen, seen)
    if recipe.distill.match == "features":
        return out
    cut = on_batch(
        functools.partial(top_classes.most_probable, k=recipe.top_k(), temperature=recipe.distill.temperature)
    )
    return {
        f"{name}_{i}": value
        for i in range(len(teachers))
        for name, value in zip(cache.OF_LOGITS, cut(out[f"logits_{i}"]), strict=True)
    }


def differences(
    recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, stored: Batch, step: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`Teaching.differences`, as scalars."""
    seen, _ = mixed(recipe, batch, step)
    apart = {}
    for name, live in said(recipe, teachers, frozen, seen).items():
        if recipe.distill.match == "logits":
            variation = on_batch(functools.partial(top_classes.variation, temperature=recipe.distill.temperature))
            index = name.removeprefix("logits_")
            apart[name] = variation(live, *(stored[f"{each}_{index}"] for each in cache.OF_LOGITS))
        else:
            difference = live.astype(jnp.float32) - stored[name].astype(jnp.float32)
            apart[name] = jnp.mean(jnp.square(difference), axis=tuple(range(1, live.ndim)))
    return {name: (jnp.mean(x), jnp.max(x)) for name, x in apart.items()}


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
    return {**batch, "image": image}, targets


def outputs(recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, seen: Batch) -> list[Output]:
    """What each teacher says of its view: one of its own, or one for all teachers, or the students'."""
    found = []
    for i, (teacher, size) in enumerate(zip(teachers, recipe.distill.image_sizes, strict=True)):
        view = next(seen[name] for name in (f"teacher_image_{i}", "teacher_image", "image") if name in seen)
        with jax.named_scope("input"):
            images = normalize(resized(view, size), teacher.data)
        with jax.named_scope("teacher"):
            found.append(jax.lax.stop_gradient(frozen.models[i](images)))
    return found


def resized(images: jax.Array, size: int) -> jax.Array:
    """(B, V, V, C) at another size, with antialiasing; itself at its own."""
    if images.shape[1] == size:
        return images

    def local(x: jax.Array) -> jax.Array:
        return jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic", antialias=True)

    return on_batch(local)(images)


def feature_moments(
    recipe: DistillRecipe, teachers: list[Teacher], frozen: Frozen, batch: Batch, step: jax.Array
) -> list[dict[str, tuple[jax.Array, jax.Array]]]:
    """`batch_moments` of each teacher's 'summary' and 'patches'."""
    seen, _ = mixed(recipe, batch, step)
    found = outputs(recipe, teachers, frozen, seen)
    return [
        {name: batch_moments(x) for name, x in aligned(output, teacher.config, recipe).items()}
        for output, teacher in zip(found, teachers, strict=True)
    ]
