"""Which mesh, rematerialisation, batch size, momentum and overlap suit a model on a number of devices.

Every combination is estimated from shapes; the best of those that fit are compiled, as long as there is time.

What only changes how a step is computed (mesh, remat, overlap) is traded freely: kept is the Pareto front of images per
second against peak memory. What changes the training is not: each batch size has a front of its own, and a momentum
dtype that is not the recipe's is listed only where it brings something. The recipe's own choice is compiled first.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

from vit22b.analytic import Estimate
from vit22b.config import MeshConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.hardware import GIB
from vit22b.model import REMAT
from vit22b.sharding import AXES, check_divisibility, mesh_shape

Shape = tuple[int, int, int]  # replica, data, model

BATCH_FACTORS = ((1, 1), (1, 2), (1, 4), (2, 1))
# Every hop of a ring is an instruction of its own: programs with longer rings take long to compile.
LONGEST_DATA_RING, LONGEST_MODEL_RING = 16, 8
# An estimate must leave this room: it has been up to 14 % below what XLA then took on GPUs.
SAFETY = 1.2
# What is slower must take less memory by this factor to be worth a line; the estimates are no better.
WORTH = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    given: Recipe  # what was searched for
    recipe: Recipe  # with mesh, remat, batch size, momentum dtype and overlap filled in
    shape: Shape
    peak: float  # bytes per device: estimated, or of the compiled step
    step_s: float  # estimated, or by `compile_fn`
    compiled: bool

    @property
    def seconds_per_image(self) -> float:
        return self.step_s / self.recipe.batch_size

    @property
    def overrides(self) -> str:
        """The flags that make this recipe of the one given: '--config.mesh.data=16 --config.model.remat=full'."""
        given = self.given.flat()
        changed = {name: value for name, value in self.recipe.flat().items() if value != given[name]}
        text = {name: str(value).lower() if isinstance(value, bool) else value for name, value in changed.items()}
        return " ".join(f"--config.{name}={value}" for name, value in text.items())

    @property
    def figures(self) -> dict[str, object]:
        """What `show` prints, for JSON."""
        return {
            "mesh": dict(zip(AXES, self.shape, strict=True)),
            "batch_size": self.recipe.batch_size,
            "peak_gib_per_device": self.peak / GIB,
            "step_s": self.step_s,
            "images_per_second": self.recipe.batch_size / self.step_s,
            "compiled": self.compiled,
            "overrides": self.overrides,
        }


def candidates(recipe: Recipe, num_devices: int) -> Iterator[tuple[Recipe, Shape]]:
    """All recipes to compare that can be sharded over so many devices, each with its mesh; the plainest come first."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    batches = [recipe.batch_size * up // down for up, down in BATCH_FACTORS if recipe.batch_size * up % down == 0]
    for model, data, batch in itertools.product(divisors, divisors, batches):
        if num_devices % (model * data):
            continue
        shape = (num_devices // (model * data), data, model)
        mesh = MeshConfig(replica=shape[0], data=data, model=model)
        sharded = dataclasses.replace(recipe, batch_size=batch, mesh=mesh)
        try:
            check_divisibility(sharded, shape)
        except RecipeError:
            continue
        rings = data * model > 1 and data <= LONGEST_DATA_RING and model <= LONGEST_MODEL_RING
        for remat, momentum, overlap in itertools.product(REMAT, ("fp32", "bf16"), ("none", "rings")[: 1 + rings]):
            if overlap == "rings" and remat == "dots":  # refused
                continue
            changed = dataclasses.replace(recipe.model, remat=remat, overlap=overlap)
            optim = dataclasses.replace(recipe.optim, momentum_dtype=momentum)
            yield dataclasses.replace(sharded, model=changed, optim=optim), shape


def search(
    recipe: Recipe,
    num_devices: int,
    memory: float,
    estimate_fn: Callable[[Recipe, Shape], Estimate],
    compile_fn: Callable[[Recipe, Shape], tuple[float, float]] | None,
    compile_best: int = 3,
    seconds: float = 420,
    report: Callable[[str], None] = print,
) -> list[Candidate]:
    """What fits `memory` (bytes per device) and is best: compiled ones first, then by seconds per image.

    `compile_fn` gives a compiled step's peak bytes and seconds, or raises `RecipeError` where it cannot be compiled;
    None: there is no compiler. At most `compile_best` are compiled, and none is begun `seconds` after the call.
    Estimates of the others are then multiplied by what the compiled ones took of theirs, in the median.
    Raises `RecipeError` where nothing fits, with the smallest there is.
    """
    end, pool = time.monotonic() + seconds, []
    own = _own_mesh(recipe, num_devices)
    as_it_is = [] if own is None else [(recipe, own)]
    for changed, shape in itertools.chain(as_it_is, candidates(recipe, num_devices)):
        e = estimate_fn(changed, shape)
        peak = float(sum(e.memory.values()))
        pool.append(Candidate(given=recipe, recipe=changed, shape=shape, peak=peak, step_s=e.step_s, compiled=False))
    if not pool:
        raise RecipeError(
            f"batch_size={recipe.batch_size}: no mesh of {num_devices} devices divides it and the model; try a "
            f"multiple of {num_devices * recipe.optim.accumulate_steps * 2}, or another number of devices"
        )
    if own is not None:  # it may be among the candidates, too, with all of its mesh spelled out
        pool = pool[:1] + [c for c in pool[1:] if not _as_it_is(c, own)]
    fitting = [c for c in pool if c.peak * SAFETY <= memory or (_as_it_is(c, own) and c.peak <= memory)]
    if own is None or not _as_it_is(fitting[0] if fitting else pool[0], own):
        report("the recipe as it is has another number of devices or takes too much memory")
    report(f"{len(pool)} candidates, {len(fitting)} of them fit by estimate")

    compiled: list[Candidate] = []
    tried: list[Candidate] = []
    longer: list[float] = []  # compiled steps against their estimates
    while compile_fn is not None and fitting and len(tried) < compile_best and time.monotonic() < end:
        best = _to_compile(fitting, tried, own)
        tried.append(best)
        report(f"compiling {best.overrides or 'the recipe as it is'}")
        try:
            found = compile_fn(best.recipe, best.shape)
        except RecipeError as error:
            report(f"dropped: {error}")
            fitting.remove(best)
            continue
        done = dataclasses.replace(best, peak=found[0], step_s=found[1], compiled=True)
        if done.peak <= memory:
            fitting.remove(best)
            compiled.append(done)
            longer.append(done.step_s / best.step_s)
        else:  # nor will those do that are computed the same way and estimated at as much
            report(f"dropped: compiled, it takes {done.peak / GIB:.1f} GiB of {memory / GIB:.1f}")
            fitting = [c for c in fitting if _way(c) != _way(best) or c.peak < best.peak]
    if not compiled and not fitting:
        smallest = min(pool, key=lambda c: c.peak)
        raise RecipeError(
            f"batch_size={recipe.batch_size}: nothing fits {memory / GIB:.1f} GiB per device on {num_devices} devices; "
            f"the smallest is estimated at {smallest.peak / GIB:.1f}, {SAFETY:g} times that to be safe, with "
            f"{smallest.overrides}; try more devices, a smaller batch_size or more optim.accumulate_steps"
        )
    factor = statistics.median(longer) if longer else 1.0  # else the two kinds of lines could not be compared
    scaled = [dataclasses.replace(c, step_s=factor * c.step_s) for c in fitting]
    return sorted(compiled, key=_by_speed) + pareto_front(scaled)


def show(found: list[Candidate]) -> str:
    """A table, one candidate a line, with the flags to paste."""
    lines = [f"{'images/s':>10} {'s a step':>9} {'GiB':>7}  {'':8}  flags"]
    for c in found:
        kind = "compiled" if c.compiled else "estimate"
        speed = f"{c.recipe.batch_size / c.step_s:10,.0f} {c.step_s:9.3f}"
        lines.append(f"{speed} {c.peak / GIB:7.1f}  {kind}  {c.overrides or 'as it is'}")
    return "\n".join(lines)


def pareto_front(fitting: list[Candidate]) -> list[Candidate]:
    """Those worth a line, fastest first: no other of their batch size is as fast, within `WORTH` as small, and either
    of the momentum dtype of the recipe given (then within `WORTH` as fast, too) or of their own."""
    front: list[Candidate] = []
    for c in sorted(fitting, key=lambda c: (_foreign(c), *_by_speed(c))):
        rivals = [k for k in front if k.recipe.batch_size == c.recipe.batch_size]
        if not any(WORTH * k.peak <= c.peak and WORTH * k.step_s <= c.step_s for k in rivals):
            front.append(c)
    return sorted(front, key=_by_speed)


def _to_compile(fitting: list[Candidate], tried: list[Candidate], own: Shape | None) -> Candidate:
    """The recipe as it is, on its `own` mesh; then the fastest, of those that train as it does if there are any.

    Of these, first what differs from those tried in more than how the batch is split, since the estimates tell such
    meshes apart well enough.
    """
    known = {_way(c)[1:] for c in tried}

    def order(c: Candidate) -> tuple:
        trains_alike = c.recipe.batch_size == c.given.batch_size and not _foreign(c)
        return not _as_it_is(c, own), not trains_alike, _way(c)[1:] in known, *_by_speed(c)

    return min(fitting, key=order)


def _own_mesh(recipe: Recipe, num_devices: int) -> Shape | None:
    """The recipe's own mesh; None where it does not fill or suit so many devices."""
    try:
        shape = mesh_shape(recipe.mesh, num_devices)
        check_divisibility(recipe, shape)
    except RecipeError:
        return None
    return shape


def _as_it_is(c: Candidate, own: Shape | None) -> bool:
    return dataclasses.replace(c.recipe, mesh=c.given.mesh) == c.given and c.shape == own


def _way(c: Candidate) -> tuple[Shape, int, str, str]:
    return c.shape, c.shape[2], c.recipe.model.remat, c.recipe.model.overlap


def _foreign(c: Candidate) -> bool:
    return c.recipe.optim.momentum_dtype != c.given.optim.momentum_dtype


def _by_speed(c: Candidate) -> tuple[float, float]:
    return c.seconds_per_image, c.peak
