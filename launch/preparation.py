"""What a recipe wants done to batches on the devices before its train step gets them: nothing, or teachers."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from distill import cache, teacher, teaching
from distill.config import DistillRecipe
from distill.teacher import Teacher
from vit22b import data
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.objective import Batch
from vit22b.sources import Source
from vit22b.train import NoPreparation, Preparation, local_part, place

ACCURACY_BATCHES = 4  # of the validation set, from which a teacher's accuracy is estimated
CHECKED_STEPS = 4  # of a cache, evenly spaced
# How far teachers may be from what is stored of them, as `Teaching.differences` says it: on average over the views of a
# step, and in any of them. Rounding, of recipes/smoke.py's model in bf16: on eight devices for one, with JAX 0.12 for
# 0.10, or in fp32 instead, at most 0.004 and 0.02; of features 0.0001 and 0.0005. Deeper models and fp8 round more.
# Views of the step after: 0.7 and 0.97, at temperature 3 0.24 and 0.39; of features 1.1 to 2, and 1.8 to 4.6. The same
# model 100 of 400 steps earlier: 0.08 and 0.34; 50 steps: 0.02 and 0.13. (Its fingerprint tells it from the later one.)
MEAN_LIMIT, VIEW_LIMIT = 0.05, 0.25


def load_teachers(recipe: Recipe) -> tuple[Recipe, list[Teacher]]:
    """The recipe with what its teachers see resolved, and these, on the mesh in force; none where it wants none.

    Raises `RecipeError`.
    """
    if not isinstance(recipe, DistillRecipe):
        return recipe, []
    recipe = teacher.resolved(recipe)
    return recipe, teacher.load(recipe)


def teacher_fingerprints(teachers: list[Teacher]) -> dict[str, str]:
    """By name for recipe.json."""
    return {f"teacher {i}": teacher.fingerprint(each) for i, each in enumerate(teachers)}


def preparation(
    recipe: Recipe,
    teachers: list[Teacher],
    sources: tuple[Source, Source],
    fingerprints: dict[str, str],
    note: Callable[[str], None],
) -> Preparation:
    """On the mesh in force, what `load_teachers` gave. `note` is told how good teachers are; a cache is checked.

    Raises `RecipeError`.
    """
    if not isinstance(recipe, DistillRecipe):
        return NoPreparation()
    # Not of the cached views: those lack what a teacher alone sees, and begin anew, perhaps within its statistics.
    live = live_teaching(recipe.without_cache(), teachers, sources, note)
    if not recipe.distill.cache:
        return live
    folder = Path(recipe.distill.cache)
    reader = cache.Reader(folder, recipe, cache.identity(recipe, fingerprints))
    verify(recipe, live, reader, sources[0])
    note(f"teachers' words come from {folder}, and agree with the teachers'")
    return teaching.CachedTeaching(recipe, reader)


def for_timing(recipe: Recipe, teachers: list[Teacher]) -> Preparation:
    """The same where no data are there: teachers that compute, their features as they are."""
    if not isinstance(recipe, DistillRecipe):
        return NoPreparation()
    check(not recipe.distill.cache, "distill.cache", recipe.distill.cache, "a benchmark has no views of it; use ''")
    return teaching.Teaching(recipe, teachers)


def live_teaching(
    recipe: DistillRecipe, teachers: list[Teacher], sources: tuple[Source, Source], note: Callable[[str], None]
) -> teaching.Teaching:
    """The teachers themselves."""
    train_source, validation_source = sources
    live = teaching.Teaching(recipe, teachers)
    found = live.accuracy(validation_source, ACCURACY_BATCHES)
    for each, size, metrics in zip(teachers, recipe.distill.image_sizes, found, strict=True):
        note(f"teacher {each.name}: width {each.config.width}, depth {each.config.depth}, at {size} px")
        if metrics is not None:
            count = metrics["examples"]
            note(f"teacher {each.name}: top-1 {metrics['top1']:.4f} on {count} evenly spaced validation images")
    live.find_statistics(train_source)
    return live


def verify(recipe: DistillRecipe, live: teaching.Teaching, reader: cache.Reader, source: Source) -> None:
    """Raises `RecipeError` unless the teachers say of the views of some steps what the cache has of them."""
    last = recipe.distill.cached_steps - 1
    for step in sorted({round(at) for at in np.linspace(0, last, CHECKED_STEPS)}):
        batches = data.train_batches(source, recipe.without_cache(), step, jax.process_index(), jax.process_count())
        found = live.differences(place(next(batches)), place(reader(step)), step)
        batches.close()
        for name, (mean, most) in found.items():
            if not (mean < MEAN_LIMIT and most < VIEW_LIMIT):  # nor if it is no number
                raise RecipeError(
                    f"distill.cache={recipe.distill.cache}: of step {step}'s views the teachers say something else "
                    f"({name}: {mean:.2g} apart, at most {most:.2g}; rounding is below {MEAN_LIMIT:g} and "
                    f"{VIEW_LIMIT:g}); write it anew with launch/teach.py"
                )


def record_all(recipe: DistillRecipe, live: teaching.Teaching, source: Source, steps: range):
    """For each of the steps this process's part of what a cache stores; the devices are a step ahead."""
    batches = data.train_batches(source, recipe, steps.start, jax.process_index(), jax.process_count())
    pending: Batch | None = None
    for step in steps:
        said = live.record(place(next(batches)), step)
        if pending is not None:
            yield {name: local_part(x) for name, x in pending.items()}
        pending = said
    batches.close()
    if pending is not None:
        yield {name: local_part(x) for name, x in pending.items()}
