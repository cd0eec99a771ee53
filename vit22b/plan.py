"""What a recipe needs and how fast it can go on machines that need not be there.

Where a compiler for them is at hand (TPUs, CPUs), the train step itself is compiled, the function that training
calls; for GPU clusters vit22b/analytic.py estimates.
"""

import collections
import dataclasses
import math
import re
import time

import jax
import numpy as np

from vit22b import analytic, hlo, sharding
from vit22b.cluster import Cluster, Torus
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.flops import executed_flops
from vit22b.hardware import GIB
from vit22b.memory import state_memory
from vit22b.step import abstract_state, trace_train_step

USABLE = 0.94  # of a GPU's memory: what launch/tpu.py gives to JAX
LARGE = 2**20  # bytes: a smaller blocking collective, such as a norm's statistics, is not worth hiding


@dataclasses.dataclass(kw_only=True, slots=True)
class Plan:
    """A plan's figures under stable names; GiB are 2^30 bytes, and of one device; None: not known there."""

    recipe: str
    topology: str
    method: str  # 'compiled': the real step; 'analytic': formulas
    devices: int
    device_kind: str
    mesh: dict[str, int]
    batch_size: int
    params: int
    state_gib_per_device: dict[str, float]  # 'parameters', 'optimizer', 'batch'
    hbm_gib: float | None
    model_flops_per_step: int  # of all devices, nothing rematerialised: MFU's
    executed_flops_per_step: int  # as traced, with what is rematerialised
    temp_gib_per_device: float | None = None  # all else, at the peak
    peak_gib_per_device: float | None = None  # state, outputs and temporaries; donated buffers once
    fits: bool | None = None
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # see `count_collectives`
    layer_collectives: list[dict] = dataclasses.field(default_factory=list)  # of the loop over layers; see `describe`
    # Of these, those above 1 MiB that are not asynchronous. None: CPUs have no asynchronous ones, formulas no order,
    # and without a loop nothing tells layers from the rest.
    blocking_in_layers: list[str] | None = None
    compute_s: float | None = None  # executed FLOPs at the bf16 peak
    communication_s: float | None = None  # all collectives, one after the other
    exposed_s: float | None = None  # of these, what nothing hides
    step_s_bound: float | None = None  # compute_s + exposed_s
    mfu_bound: float | None = None
    step_s_estimate: float | None = None  # with XLA's own estimate of each instruction; or, analytic, calibrated
    mfu_estimate: float | None = None
    train_days: float | None = None  # all steps at step_s_bound
    train_days_estimate: float | None = None  # at step_s_estimate
    chip_hours: float | None = None  # of all devices, at step_s_bound
    chip_hours_estimate: float | None = None
    compile_s: float | None = None  # tracing included


def make_plan(recipe: Recipe, cluster: Cluster) -> Plan:
    """Compiles or estimates the recipe's train step there.

    Raises `RecipeError` where the mesh does not fill the cluster or does not divide the model. A step that does not
    fit gives a plan that says so.
    """
    recipe.validate()
    cudnn = recipe.model.attention == "cudnn" and cluster.devices is not None
    check(not cudnn, "model.attention", "'cudnn'", f"needs GPUs, not {cluster.name}; use 'auto' or 'xla'")
    unknown = recipe.model.matmul == "fp8" and cluster.chip is not None
    check(not unknown, "model.matmul", "'fp8'", "its speed and memory are not modelled so far; plan with 'bf16'")
    shape = sharding.mesh_shape(recipe.mesh, cluster.num_devices)
    sharding.check_divisibility(recipe, shape)
    return _estimated(recipe, cluster, shape) if cluster.devices is None else _compiled(recipe, cluster, shape)


def _compiled(recipe: Recipe, cluster: Cluster, shape: tuple[int, int, int]) -> Plan:
    assert cluster.devices is not None
    mesh = sharding.make_mesh(shape, cluster.devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = trace_train_step(recipe, sharding.concrete(abstract_state(recipe), mesh))
    plan = _without_step(recipe, cluster, shape, executed_flops(traced.jaxpr.jaxpr))
    with jax.set_mesh(mesh):
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
            if needed is None:
                first = str(error).strip().splitlines()[0]
                raise RecipeError(f"--topology={cluster.name}: the compiler failed: {first}") from error
            plan.temp_gib_per_device = float(needed[1])
            plan.peak_gib_per_device = plan.temp_gib_per_device + sum(plan.state_gib_per_device.values())
            plan.fits, plan.compile_s = False, round(time.perf_counter() - start, 1)
            return plan
    plan.compile_s = round(time.perf_counter() - start, 1)
    memory = compiled.memory_analysis()
    if memory is not None:
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
        if cluster.devices[0].platform == "cpu":  # whose peak leaves out temporaries
            outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
        plan.peak_gib_per_device = peak / GIB
        plan.temp_gib_per_device = (peak - memory.argument_size_in_bytes) / GIB
        plan.fits = None if plan.hbm_gib is None else plan.peak_gib_per_device <= plan.hbm_gib
    links, clock = None, 0.0
    if cluster.chip is not None and hasattr(cluster.devices[0], "coords"):
        coords = np.array([device.coords for device in mesh.devices.flat])
        links, clock = Torus(coords, cluster.chip.link_bandwidth), cluster.chip.clock
    trips = recipe.model.depth // recipe.model.scan_unroll
    try:
        replay = hlo.Replay(hlo.parse(compiled.as_text()), cluster.num_devices, links, clock, trips)
    except ValueError as error:  # rather than figures that leave something out
        raise RecipeError(f"--topology={cluster.name}: this compiler's output is not understood: {error}") from error
    plan.collectives = count_collectives(replay.collectives, recipe.model.depth)
    plan.layer_collectives = describe([c for c in replay.collectives if c.in_layers])
    if links is not None and trips > 1:
        plan.blocking_in_layers = [
            f"{row['count']} x {row['kind']} of {row['bytes'] / 2**20:.1f} MiB"
            for row in plan.layer_collectives
            if not row["asynchronous"] and row["bytes"] > LARGE
        ]
    if links is not None:
        communication = sum(c.seconds * c.runs for c in replay.collectives)
        exposed = sum(c.exposed * c.runs for c in replay.collectives) if clock else None
        _set_times(plan, recipe, cluster, communication, exposed, replay.seconds if clock else None)
    return plan


def _estimated(recipe: Recipe, cluster: Cluster, shape: tuple[int, int, int]) -> Plan:
    assert cluster.chip is not None
    estimate = analytic.estimate(recipe, cluster.chip, shape, cluster.devices_per_node)
    executed = round(estimate.flops * cluster.num_devices)
    plan = _without_step(recipe, cluster, shape, executed)
    plan.peak_gib_per_device = sum(estimate.memory.values()) / GIB
    plan.temp_gib_per_device = plan.peak_gib_per_device - sum(plan.state_gib_per_device.values())
    plan.fits = plan.peak_gib_per_device <= USABLE * cluster.chip.memory / GIB
    for traffic in estimate.traffic:
        row = plan.collectives.setdefault(traffic.kind, dict.fromkeys(COLUMNS, 0))
        row["per_layer"] += traffic.per_layer
        row["total"] += traffic.total
        row["bytes_per_step"] += traffic.bytes
        row["asynchronous"] += traffic.total if traffic.hidden else 0
        row["seconds"] += traffic.seconds
        row["exposed_seconds"] += traffic.exposed if traffic.hidden else traffic.seconds
    _set_times(plan, recipe, cluster, estimate.communication_s, estimate.exposed_s, estimate.step_s)
    return plan


def _without_step(recipe: Recipe, cluster: Cluster, shape: tuple[int, int, int], executed: int) -> Plan:
    """All that is known before a step is compiled or estimated."""
    state = state_memory(recipe, shape)
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(shape)):
        params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_state(recipe).model))
        batch = sharding.bytes_per_device(recipe.objective().batch())
    return Plan(
        recipe=recipe.name,
        topology=cluster.name,
        method="analytic" if cluster.devices is None else "compiled",
        devices=cluster.num_devices,
        device_kind=cluster.device_kind,
        mesh=dict(zip(sharding.AXES, shape, strict=True)),
        batch_size=recipe.batch_size,
        params=params,
        state_gib_per_device={
            "parameters": state["parameters"] / GIB,
            "optimizer": state["optimizer"] / GIB,
            "batch": batch / GIB,
        },
        hbm_gib=None if cluster.chip is None else cluster.chip.memory / GIB,
        model_flops_per_step=recipe.objective().flops() * recipe.batch_size,
        executed_flops_per_step=executed,
    )


def _set_times(
    plan: Plan, recipe: Recipe, cluster: Cluster, communication: float, exposed: float | None, estimate: float | None
) -> None:
    """Fills in what follows from seconds of communication, of what of it is exposed, and of the estimated step."""
    assert cluster.chip is not None
    peak = cluster.chip.peak_flops * cluster.num_devices
    plan.compute_s = plan.executed_flops_per_step / peak
    plan.communication_s, plan.exposed_s = communication, exposed
    plan.step_s_bound = plan.compute_s + (exposed or 0.0)  # nothing is known to be exposed without a replay
    plan.mfu_bound = plan.model_flops_per_step / (peak * plan.step_s_bound)
    if estimate is not None:
        plan.step_s_estimate, plan.mfu_estimate = estimate, plan.model_flops_per_step / (peak * estimate)
        plan.train_days_estimate = recipe.total_steps * estimate / 86_400
        plan.chip_hours_estimate = 24 * plan.train_days_estimate * cluster.num_devices
    plan.train_days = recipe.total_steps * plan.step_s_bound / 86_400
    plan.chip_hours = 24 * plan.train_days * cluster.num_devices


COLUMNS = ("per_layer", "total", "bytes_per_step", "asynchronous", "seconds", "exposed_seconds", "beside_seconds")


def count_collectives(found: list[hlo.Collective], depth: int) -> dict[str, dict[str, float]]:
    """By kind, for one device and one step.

    'per_layer': how many one layer runs, forward and backward together; 'total', and of them 'asynchronous';
    'bytes_per_step' that the device receives; 'seconds' on the links, of them 'exposed_seconds' for which the core
    waits; 'beside_seconds' of compute between their starts and ends.
    """
    table: dict[str, dict[str, float]] = {}
    layers: collections.Counter = collections.Counter()
    for c in found:
        row = table.setdefault(c.kind, dict.fromkeys(COLUMNS, 0))
        row["total"] += c.runs
        row["asynchronous"] += c.runs if c.asynchronous else 0
        row["bytes_per_step"] += c.bytes * c.runs
        row["seconds"] += c.seconds * c.runs
        row["exposed_seconds"] += c.exposed * c.runs
        row["beside_seconds"] += c.beside * c.runs
        layers[c.kind] += c.runs if c.in_layers else 0
    for kind, row in table.items():
        row["per_layer"] = layers[kind] / depth
    return table


def describe(found: list[hlo.Collective]) -> list[dict]:
    """One entry for all collectives of the same kind and size.

    'count' instructions, of which each moves 'bytes', in 'runs' executions a step all together; of one execution the
    mean 'seconds' on the links, 'beside_s' of compute between start and end, 'exposed_s' for which the core waits.
    """
    alike: dict[tuple, list[hlo.Collective]] = {}
    for c in found:
        alike.setdefault((c.kind, c.bytes, c.asynchronous), []).append(c)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return [
        {
            "kind": kind,
            "bytes": size,
            "asynchronous": asynchronous,
            "count": len(same),
            "runs": sum(c.runs for c in same),
            "seconds": mean([c.seconds for c in same]),
            "beside_s": mean([c.beside for c in same]),
            "exposed_s": mean([c.exposed for c in same]),
        }
        for (kind, size, asynchronous), same in sorted(alike.items(), key=lambda item: -item[0][1])
    ]
