"""Times a recipe's train step on the devices here, as training compiles, shards and feeds it."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from vit22b import data, profile, sharding
from vit22b.clocks import COMMAND, ClockSampler
from vit22b.config import Recipe
from vit22b.hardware import GIB, peak_flops
from vit22b.memory import check_step_memory, step_bytes
from vit22b.sources import Source
from vit22b.step import (
    TrainState,
    abstract_state,
    compile_train_step,
    compiler_options,
    init_state,
    trace_train_step,
)
from vit22b.timing import spread, time_groups, warm_up
from vit22b.train import Preparation, place

PROFILED = 3  # steps


class Runner:
    """The state of a run and its steps, queued one after another as the train loop does."""

    def __init__(self, step: Callable, state: TrainState, next_batch: Callable[[], dict]) -> None:
        self.step, self._state, self._next_batch = step, state, next_batch
        self._batch = next_batch()
        self._loss: jax.Array | None = None

    def queue(self) -> None:
        """Queues a step and gets the next batch while the device computes."""
        self._state, metrics = self.step(self._state, self._batch)
        self._loss = metrics["loss"]
        self._batch = self._next_batch()

    def wait(self) -> float | None:
        """Waits for all that is queued; the last step's loss."""
        jax.block_until_ready(self._state)
        return None if self._loss is None else float(self._loss)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.queue()
        self.wait()


def measure(recipe: Recipe, mesh: Mesh, source: Source | None, steps: int, prepare: Preparation) -> dict[str, object]:
    """A recipe's figures on the mesh in force, under the names that `launch/bench.py --help` explains.

    `source` gives the training images; None: one random batch lies on the devices. `steps` are timed, a multiple of
    `timing.GROUP`. Raises `RecipeError` where the step does not fit the devices. Where profiling fails,
    'profile_error' says so and 'regions', 'kinds' and 'kernels' are None.
    """
    abstract = sharding.concrete(abstract_state(recipe), mesh)
    start = time.perf_counter()
    compiled = compile_train_step(recipe, abstract)
    compile_s = time.perf_counter() - start
    check_step_memory(recipe, compiled, mesh, prepare.bytes_per_device)
    waited: list[float] = []
    batches = None if source is None else data.train_batches(source, recipe, 0, process_index=0, process_count=1)
    fixed = random_batch(recipe) if batches is None else {}

    def next_batch() -> dict:
        if batches is None:
            return prepare(fixed, 0)
        asked = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - asked)
        return prepare(place(batch), 0)

    device = mesh.devices.flat[0]
    try:
        runner = Runner(compiled, jax.jit(functools.partial(init_state, recipe))(), next_batch)
        with ClockSampler(COMMAND if device.platform == "gpu" else None) as clocks:
            warm_up(runner.queue, runner.wait)
            waited.clear()
            clocks.restart()
            ms = time_groups(runner.queue, runner.wait, steps)
        wait_s = sum(waited) / steps if waited else None
        loss, memory, device_memory = runner.wait(), step_bytes(compiled), device.memory_stats() or {}
        profiled = profile_steps(recipe, abstract, runner, device.platform)
    finally:
        if batches is not None:
            batches.close()
    timed, peak = spread(ms), peak_flops(device)
    step_s = timed["step_ms"] / 1e3
    flops = (recipe.objective().flops() + prepare.flops) * recipe.batch_size
    in_use = device_memory.get("peak_bytes_in_use")
    return {
        "params_m": sum(leaf.size for leaf in jax.tree.leaves(abstract.model)) / 1e6,
        "compile_s": compile_s,
        **timed,
        "images_per_second": recipe.batch_size / step_s,
        "mfu": None if peak is None else flops / step_s / mesh.size / peak,
        "peak_gib": None if memory is None else memory / GIB,
        "device_peak_gib": None if in_use is None else in_use / GIB,
        "loss": loss,
        "data_wait_s": wait_s,
        **profiled,
        **clocks.figures(),
    }


def random_batch(recipe: Recipe) -> dict[str, jax.Array]:
    """A batch of random images and labels on the devices, as the input pipeline would give it."""
    random, count = np.random.default_rng(0), recipe.batch_size
    batch = {
        view.name: random.integers(0, 256, (count, view.size, view.size, 3), dtype=np.uint8) for view in recipe.views()
    }
    return place(batch | {"label": random.integers(0, recipe.model.num_classes, count, dtype=np.int32)})


def profile_steps(recipe: Recipe, state: TrainState, runner: Runner, platform: str) -> dict[str, object]:
    """The fields of `profile.Shares`, or None each and a line in 'profile_error'. Never raises."""
    try:
        runner.step = compiled = profile.compile_for_profile(
            trace_train_step(recipe, state), platform, compiler_options(recipe)
        )
        runner.run(1)
        events = profile.record(lambda: runner.run(PROFILED))
        found = dataclasses.asdict(profile.shares(compiled.as_text() or "", events, PROFILED))
        return {**found, "profile_error": None}
    except Exception as error:  # XLA, the profiler and its file format: the times above are worth keeping
        line = " ".join(str(error).split())[:200]
        return {"regions": None, "kinds": None, "kernels": None, "profile_error": f"{type(error).__name__}: {line}"}
