"""What a recipe wants done to batches on the devices before its train step gets them: nothing, or teachers."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from distill import cache, teacher
from distill.config import DistillRecipe
from vit22b import data
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.objective import Batch
from vit22b.sources import Source
from vit22b.train import NoPreparation, Preparation, local_part, place

ACCURACY_BATCHES = 4  # of the validation set, from which a teacher's accuracy is estimated
# By which log-probabilities of a live teacher may differ from stored ones: fp16 rounds, and bf16 on other devices.
TOLERANCE = 0.1


def teacher_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of the recipe's teachers, by name for recipe.json. Raises `RecipeError` where there is none."""
    if not isinstance(recipe, DistillRecipe):
        return {}
    return {f"teacher {i}": teacher.fingerprint(name) for i, name in enumerate(recipe.distill.teachers)}


def preparation(
    recipe: Recipe, sources: tuple[Source, Source], fingerprints: dict[str, str], note: Callable[[str], None]
) -> Preparation:
    """On the mesh in force. Teachers are loaded, and `note` is told how good they are; a cache is checked against them.

    Raises `RecipeError`.
    """
    if not isinstance(recipe, DistillRecipe):
        return NoPreparation()
    # Not of the cached views: those lack what a teacher alone sees, and begin anew, perhaps within its statistics.
    teaching = live_teaching(recipe.without_cache(), sources, note)
    if not recipe.distill.cache:
        return teaching
    folder = Path(recipe.distill.cache)
    reader = cache.Reader(folder, recipe, cache.identity(recipe, fingerprints))
    verify(recipe, teaching, reader, sources[0])
    note(f"teachers' words come from {folder}, and agree with the teachers'")
    return teacher.CachedTeaching(recipe, reader)


def for_timing(recipe: Recipe) -> Preparation:
    """The same where no data are there: teachers that compute, their features as they are."""
    if not isinstance(recipe, DistillRecipe):
        return NoPreparation()
    check(not recipe.distill.cache, "distill.cache", recipe.distill.cache, "a benchmark has no views of it; use ''")
    return teacher.Teaching(recipe, teacher.load(recipe))


def live_teaching(
    recipe: DistillRecipe, sources: tuple[Source, Source], note: Callable[[str], None]
) -> teacher.Teaching:
    """The teachers themselves."""
    train_source, validation_source = sources
    teachers = teacher.load(recipe)
    teaching = teacher.Teaching(recipe, teachers)
    for each, size in zip(teachers, recipe.teacher_sizes(), strict=True):
        note(f"teacher {each.name}: width {each.config.width}, depth {each.config.depth}, at {size} px")
    if recipe.distill.match == "logits":
        for each, found in zip(teachers, teaching.accuracy(validation_source, ACCURACY_BATCHES), strict=True):
            top1, count = found["top1"], found["examples"]
            note(f"teacher {each.name}: top-1 {top1:.4f} on the first {count} validation images")
    teaching.find_statistics(train_source)
    return teaching


def verify(recipe: DistillRecipe, teaching: teacher.Teaching, reader: cache.Reader, source: Source) -> None:
    """Raises `RecipeError` unless the teachers say of the views of the first step what the cache has of them."""
    live = recipe.without_cache()
    batches = data.train_batches(source, live, 0, jax.process_index(), jax.process_count())
    found = {name: local_part(x) for name, x in teaching.record(place(next(batches)), 0).items()}
    batches.close()
    stored = reader(0)
    names = [name for name in stored if not name.startswith("classes")]
    worst = max(float(np.abs(found[n].astype(np.float32) - stored[n].astype(np.float32)).max()) for n in names)
    if not worst < TOLERANCE:
        raise RecipeError(
            f"distill.cache={recipe.distill.cache}: of the first step's views the teachers say something else, by up "
            f"to {worst:.2g} where {TOLERANCE:g} may be rounding; write the cache anew with launch/teach.py"
        )


def record_all(recipe: DistillRecipe, teaching: teacher.Teaching, source: Source, steps: range):
    """For each of the steps this process's part of what a cache stores; the devices are a step ahead."""
    batches = data.train_batches(source, recipe, steps.start, jax.process_index(), jax.process_count())
    pending: Batch | None = None
    for step in steps:
        said = teaching.record(place(next(batches)), step)
        if pending is not None:
            yield {name: local_part(x) for name, x in pending.items()}
        pending = said
    batches.close()
    if pending is not None:
        yield {name: local_part(x) for name, x in pending.items()}
