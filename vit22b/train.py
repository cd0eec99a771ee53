"""The one train loop: the order in which a run does things.

A step's randomness and its data are functions of (seed, step), so a resumed run repeats an uninterrupted one
bit for bit.
"""

import functools
import time
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np
from clu.parameter_overview import get_parameter_overview
from jax.sharding import NamedSharding, get_mesh

from vit22b import data, sharding
from vit22b.checkpoint import Checkpoints
from vit22b.config import Recipe
from vit22b.hardware import peak_flops
from vit22b.memory import check_step_memory
from vit22b.metrics import ClassificationSums
from vit22b.model import ViT
from vit22b.names import named_leaves
from vit22b.objective import Batch
from vit22b.report import Reporter
from vit22b.sources import Source
from vit22b.step import abstract_state, compile_eval_step, compile_train_step, compiler_options, init_state


class Preparation(Protocol):
    """What happens on the devices to a batch of the input pipeline before the train step of a number gets it."""

    bytes_per_device: int  # that it keeps there
    flops: int  # of matmuls, for each image

    def __call__(self, batch: Batch, step: int) -> Batch: ...


class NoPreparation:
    """Where the train step takes what the input pipeline gives."""

    bytes_per_device = flops = 0

    def __call__(self, batch: Batch, step: int) -> Batch:
        return batch


def train(recipe: Recipe, sources: tuple, checkpoints: Checkpoints, reporter: Reporter, prepare: Preparation) -> None:
    """Runs a recipe to its last step on the mesh in force, from the newest checkpoint if there is one.

    `sources` are the training and the validation set. Raises FloatingPointError after the first step whose loss or
    gradient is not finite, and `RecipeError` before allocating where the step does not fit the devices.
    """
    train_source, validation_source = sources
    objective = recipe.objective()
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    mesh = get_mesh()
    abstract = sharding.concrete(abstract_state(recipe), mesh)
    start = time.perf_counter()
    train_fn = compile_train_step(recipe, abstract)
    reporter.note(get_parameter_overview(named_leaves(abstract.model), include_stats=False), on_terminal=False)
    options = ", ".join(f"{name}={value}" for name, value in compiler_options(recipe).items()) or "none of ours"
    reporter.note(f"compiled the train step in {time.perf_counter() - start:.1f} s; options for XLA: {options}")
    eval_fns = {name: compile_eval_step(recipe, m) for name, m in objective.models(abstract.eval_model).items()}
    for compiled in (train_fn, *eval_fns.values()):
        check_step_memory(recipe, compiled, mesh, prepare.bytes_per_device)

    resumed = checkpoints.latest_step is not None
    state = checkpoints.restore(abstract) if resumed else jax.jit(functools.partial(init_state, recipe))()
    first = int(state.step)
    if resumed:
        reporter.note(f"resumed after step {first}")
    batches = data.train_batches(train_source, recipe, first, **processes)
    peak = peak_flops(mesh.devices.flat[0])
    reporter.start(first, objective.flops() + prepare.flops, None if peak is None else peak * mesh.size)

    def evaluate_all() -> dict[str, float]:
        models = objective.models(state.eval_model)
        found = {name: evaluate(recipe, eval_fns[name], m, validation_source) for name, m in models.items()}
        return {f"{name}{key}": value for name, results in found.items() for key, value in results.items()}

    batch = prepare(place(next(batches)), first)
    for step in range(first + 1, recipe.total_steps + 1):
        last = step == recipe.total_steps
        state, metrics = train_fn(state, batch)
        if not last:
            with reporter.waiting_for_data():  # while the device computes
                host_batch = next(batches)
            batch = prepare(place(host_batch), step)
        reporter.step(step, metrics)
        stopping = checkpoints.preempted(step) and not last
        if last or stopping or step % recipe.run.checkpoint_every_steps == 0:
            reporter.flush()  # a state that is not finite is never saved
            with reporter.paused():
                checkpoints.save(step, state)
        if stopping:
            reporter.note(f"stopped by a signal after step {step}; the same command goes on from there")
            break
        if not last and step % recipe.run.eval_every_steps == 0:
            reporter.flush()
            with reporter.paused():
                reporter.evaluation(step, evaluate_all())
    else:  # also where only the last evaluation was missing
        reporter.evaluation(recipe.total_steps, evaluate_all())
    batches.close()


def evaluate(recipe: Recipe, eval_fn: Callable, model: ViT, source: Source) -> dict[str, float]:
    """Metrics over a validation set; `eval_fn(model, batch)` gives the sums of one batch."""
    totals: list[ClassificationSums] = []
    pending: list[ClassificationSums] = []  # the device works on the next batch while the host adds up
    batches = data.eval_batches(source, recipe, jax.process_index(), jax.process_count())
    for batch in batches:
        pending.append(eval_fn(model, place(batch)))
        if len(pending) > 2:
            totals.append(pending.pop(0).on_host())
    batches.close()
    totals += [sums.on_host() for sums in pending]
    return functools.reduce(lambda a, b: a + b, totals).result()


def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, put on its devices; the result is the global batch."""
    placed = NamedSharding(get_mesh(), sharding.BATCH)
    return {name: jax.make_array_from_process_local_data(placed, x) for name, x in batch.items()}


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of a global batch that this process has."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
