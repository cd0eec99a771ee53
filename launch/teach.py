"""Has a recipe's teachers look at the views of its first steps, once, and stores what they say.

    python launch/teach.py --config recipes/distill_b16.py --config.distill.cache=FOLDER
        --config.distill.cached_steps=N

With the same flags, launch/tpu.py then trains from FOLDER, and sees these N steps' views again and again. N x batch
size views are stored; ViT-22B's 500 per image take N = 500 x images / batch size. The same command again goes on where
it stopped; several processes write their parts, as launch/tpu.py reads them. Exit status: 0; 2, a mistake.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of a GPU, as in launch/tpu.py

import jax

from distill import cache
from distill.config import DistillRecipe
from launch.command_line import parse
from launch.preparation import live_teaching, load_teachers, record_all, teacher_fingerprints
from launch.tpu import check_on_devices, join_cluster, keep_compiled_programs
from vit22b import data, sharding
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check


def teach(recipe: Recipe) -> None:
    """Writes what is missing of the recipe's cache. Raises `RecipeError`."""
    if not isinstance(recipe, DistillRecipe):
        raise RecipeError(f"--config: {recipe.name} has no teachers; give a recipe with a DistillConfig")
    shape = check_on_devices(recipe)
    check(bool(recipe.distill.cache), "distill.cache", "''", "give the folder to write, and distill.cached_steps")
    sources = data.open_sources(recipe)
    keep_compiled_programs(jax.devices()[0].platform)
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices())):
        recipe, teachers = load_teachers(recipe)
        assert isinstance(recipe, DistillRecipe)
        fingerprints = {"train": sources[0].fingerprint(), **teacher_fingerprints(teachers)}
        folder = Path(recipe.distill.cache)
        writer = cache.Writer(folder, recipe, cache.identity(recipe, fingerprints))
        missing, size = writer.missing(), writer.bytes_per_view
        views = recipe.distill.cached_steps * recipe.batch_size
        print(f"{recipe.name}: {views:,} views of {size} bytes, {views * size:,} in all")
        if not missing:
            print(f"complete: {folder}")
            return
        live = recipe.without_cache()
        teaching = live_teaching(live, teachers, sources, print)
        for steps in missing:
            start = time.perf_counter()
            writer.write(steps, record_all(live, teaching, sources[0], steps))
            speed = len(steps) * recipe.batch_size / (time.perf_counter() - start)
            print(f"step {steps.stop:>7}/{recipe.distill.cached_steps}  {speed:,.0f} views/s", flush=True)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    try:
        recipe, workdir = parse(sys.argv)
        check(workdir is None, "--workdir", workdir, "nothing is trained; the folder to write is distill.cache")
        join_cluster()
        teach(recipe)
        return 0
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
