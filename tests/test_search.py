"""The search for a mesh, with made-up estimates and compilations, and once with real estimates."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.command_line import parse
from vit22b import search as module
from vit22b.analytic import Estimate, estimate
from vit22b.config import Recipe
from vit22b.errors import RecipeError
from vit22b.hardware import CHIPS
from vit22b.search import SAFETY, WORTH, Candidate, candidates, pareto_front, search, show
from vit22b.sharding import check_divisibility, mesh_shape

RECIPES = Path(__file__).parent.parent / "recipes"
Shape = tuple[int, int, int]


def parsed(name: str, *args: str) -> Recipe:
    return parse(["x", "--config", str(RECIPES / name), *args])[0]


DEBUG = parsed("debug.py")  # batch 64 in two microbatches, width 64, two heads, bf16 momentum
BIG = 1e9


def fake(peak: float, seconds: float) -> Estimate:
    return Estimate(memory={"parameters": int(peak)}, flops=0.0, compute_s=seconds, traffic=[])


def at_random(recipe: Recipe, shape: Shape) -> Estimate:
    """The same for the same recipe, on every machine, however it spells its mesh."""
    decides = {name: value for name, value in recipe.flat().items() if not name.startswith(("mesh.", "data."))}
    draw = random.Random(repr((decides, shape)))
    return fake(draw.uniform(100, 200), draw.uniform(1, 2) * recipe.batch_size)


def quiet(line: str) -> None:
    assert "\n" not in line


def run(given: Recipe = DEBUG, memory: float = BIG, compile_fn: Callable | None = None, **options) -> list[Candidate]:
    return search(given, 4, memory, options.pop("estimate_fn", at_random), compile_fn, report=quiet, **options)


def test_candidates_are_all_that_four_devices_can_shard() -> None:
    found = list(candidates(DEBUG, 4))
    # Two heads: 'model' is 1 or 2.
    assert {shape for _, shape in found} == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}
    assert {recipe.batch_size for recipe, _ in found} == {16, 32, 64, 128}
    # Four rematerialisations, two momenta; in rings, where there are any, three rematerialisations more.
    assert len(found) == 4 * 2 * (4 + 4 * (4 + 3))
    assert len({repr(recipe) for recipe, _ in found}) == len(found)
    for recipe, shape in found:
        check_divisibility(recipe, shape)
        assert (recipe.mesh.replica, recipe.mesh.data, recipe.mesh.model) == shape
    # A microbatch has at least one example on each of 16 parts of the batch: 16 / 2 are too few.
    assert {recipe.batch_size for recipe, _ in candidates(DEBUG, 32)} == {32, 64, 128}


def test_rings_stay_short_and_other_axes_need_not() -> None:
    found = list(candidates(parsed("vit22b.py:22B"), 1024))
    rings = [shape for recipe, shape in found if recipe.model.overlap == "rings"]
    assert {data for _, data, _ in rings} == {1, 2, 4, 8, 16}
    assert {model for _, _, model in rings} == {1, 2, 4, 8}
    assert (1024, 1, 1) not in rings
    assert (1, 1024, 1) in {shape for _, shape in found}


def test_the_front_is_what_brute_force_leaves() -> None:
    everything = {repr(r): (r, at_random(r, shape)) for r, shape in candidates(DEBUG, 4)}
    memory = 180 * SAFETY
    found = run(memory=memory)
    points = [(r.batch_size, r.optim.momentum_dtype, e.step_s, sum(e.memory.values())) for r, e in everything.values()]
    points = [p for p in points if p[3] * SAFETY <= memory]
    kept = {(c.recipe.batch_size, c.recipe.optim.momentum_dtype, c.step_s, c.peak) for c in found}
    assert kept < set(points)
    assert {p[0] for p in kept} == {16, 32, 64, 128}

    def rivals(p: tuple) -> list[tuple]:
        """Of whom one takes the place of `p`: of its batch size, and with the recipe's momentum or its own."""
        return [q for q in points if q != p and q[0] == p[0] and q[1] in ("bf16", p[1])]

    for p in points:
        if p in kept:
            assert not any(q[2] <= p[2] and q[3] <= p[3] for q in rivals(p))
        else:
            assert any(q in kept and WORTH * q[2] <= p[2] and WORTH * q[3] <= p[3] for q in rivals(p))
    speeds = [c.step_s / c.recipe.batch_size for c in found]
    assert speeds == sorted(speeds)
    assert not any(c.compiled for c in found)


def test_another_momentum_is_listed_only_for_what_it_saves() -> None:
    def momentum(share: float) -> Callable:
        return lambda r, shape: fake(100 * (share if r.optim.momentum_dtype == "bf16" else 1), r.batch_size)

    given = parsed("debug.py", "--config.optim.momentum_dtype=fp32")
    assert {c.recipe.optim.momentum_dtype for c in run(given, estimate_fn=momentum(0.99))} == {"fp32"}
    assert {c.recipe.optim.momentum_dtype for c in run(given, estimate_fn=momentum(0.5))} == {"fp32", "bf16"}
    assert {c.recipe.optim.momentum_dtype for c in run(DEBUG, estimate_fn=momentum(0.99))} == {"bf16"}


def test_overrides_make_the_candidate_of_the_recipe() -> None:
    found = run()
    assert len(found) > 8
    for c in found:
        assert parsed("debug.py", *c.overrides.split()) == c.recipe
    same = Candidate(given=DEBUG, recipe=DEBUG, shape=(1, 4, 1), peak=1.0, step_s=1.0, compiled=False)
    assert same.overrides == ""


def test_compiled_ones_come_first_with_their_own_figures_and_differ_in_how_they_compute() -> None:
    compiled = []

    def compile_fn(recipe: Recipe, shape: Shape) -> tuple[float, float]:
        compiled.append((shape, recipe.model.remat, recipe.model.overlap, recipe.batch_size))
        return 1000.0 + len(compiled), 1e6 - len(compiled)

    found = run(compile_fn=compile_fn, compile_best=3)
    assert [c.compiled for c in found] == [True] * 3 + [False] * (len(found) - 3)
    # Slower than any estimate; the last compiled was the fastest of them.
    assert [(c.peak, c.step_s) for c in found[:3]] == [(1003.0, 1e6 - 3), (1002.0, 1e6 - 2), (1001.0, 1e6 - 1)]
    assert len({(shape[2], remat, overlap) for shape, remat, overlap, _ in compiled}) == 3
    assert {batch_size for *_, batch_size in compiled} == {DEBUG.batch_size}
    # The recipe as it is, then the fastest that is computed in another way.
    assert compiled[0] == ((1, 4, 1), DEBUG.model.remat, DEBUG.model.overlap, DEBUG.batch_size)
    fastest = min((c for c in run() if c.recipe.batch_size == 64), key=lambda c: c.step_s)
    assert compiled[1][:3] == (fastest.shape, fastest.recipe.model.remat, fastest.recipe.model.overlap)


def test_what_compiles_to_too_much_is_dropped_and_the_next_is_tried() -> None:
    tried = []

    def compile_fn(recipe: Recipe, shape: Shape) -> tuple[float, float]:
        tried.append((shape, recipe.model, recipe.batch_size, recipe.optim.momentum_dtype))
        if len(tried) == 2:
            raise RecipeError("model.remat=x: cannot be compiled")
        return (BIG + 1 if len(tried) == 1 else BIG), 1.0

    found = run(compile_fn=compile_fn, compile_best=3)
    assert len(tried) == 3
    left = [(c.shape, c.recipe.model, c.recipe.batch_size, c.recipe.optim.momentum_dtype) for c in found]
    assert [key for key, c in zip(left, found, strict=True) if c.compiled] == tried[2:]
    assert not {repr(t) for t in tried[:2]} & {repr(t) for t in left}


def test_no_compilation_begins_after_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def compile_fn(recipe: Recipe, shape: Shape) -> tuple[float, float]:
        now[0] += 150
        return 1.0, 1.0

    found = run(compile_fn=compile_fn, compile_best=9, seconds=400)
    assert sum(c.compiled for c in found) == 3  # begun at 0, 150 and 300
    assert now[0] == 450


def test_the_recipe_as_it_is_is_tried_though_no_candidate_and_a_tight_fit() -> None:
    given = parsed("debug.py", "--config.model.remat=full", "--config.model.scan_unroll=1")
    tight = sum(at_random(given, (1, 4, 1)).memory.values()) + 1
    compiled = []

    def compile_fn(recipe: Recipe, shape: Shape) -> tuple[float, float]:
        compiled.append((recipe, shape))
        return 1.0, 1.0

    found = run(given, memory=tight, compile_fn=compile_fn, compile_best=1)
    assert compiled == [(given, (1, 4, 1))]
    assert (found[0].recipe, found[0].overrides) == (given, "")


def test_where_nothing_fits_one_line_says_what_is_the_smallest() -> None:
    smallest = min(sum(at_random(*c).memory.values()) for c in candidates(DEBUG, 4))
    as_it_is = sum(at_random(DEBUG, mesh_shape(DEBUG.mesh, 4)).memory.values())  # may fit without SAFETY
    with pytest.raises(
        RecipeError, match=r"^batch_size=64: nothing fits 0\.0 GiB per device on 4 devices; .*; try more"
    ) as e:
        run(memory=min(smallest * SAFETY, as_it_is) - 1)
    assert "\n" not in str(e.value)
    best = next(c for c in candidates(DEBUG, 4) if sum(at_random(*c).memory.values()) == smallest)[0]
    assert f"--config.batch_size={best.batch_size} " in str(e.value) or best.batch_size == 64
    assert run(memory=math.ceil(smallest * SAFETY))
    # An estimate that fits, but no compiled step does.
    with pytest.raises(RecipeError, match="nothing fits"):
        run(memory=math.ceil(smallest * SAFETY), compile_fn=lambda r, shape: (BIG, 1.0), compile_best=99)


def test_the_table_and_the_figures_say_the_same() -> None:
    one = run(memory=1e12, estimate_fn=lambda r, s: fake(3 * 2**29, 2.0))[0]
    assert one.figures["images_per_second"] == one.recipe.batch_size / 2.0
    assert one.figures["peak_gib_per_device"] == 1.5
    heading, line = show([one]).splitlines()
    assert heading.split()[0] == "images/s"
    assert line.split()[:4] == [f"{one.recipe.batch_size / 2:.0f}", "2.000", "1.5", "estimate"]
    assert line.endswith(one.overrides)


def test_a_batch_that_no_mesh_divides_is_refused_in_one_line() -> None:
    with pytest.raises(RecipeError, match=r"^batch_size=64: no mesh of 7 devices .* multiple of 28"):
        search(DEBUG, 7, BIG, at_random, None, report=quiet)


def test_two_servers_of_h200s_train_100m_by_fsdp_with_estimates_alone() -> None:
    given, chip = parsed("vit22b.py:100M"), CHIPS["NVIDIA H200"]
    found = search(given, 16, chip.memory, lambda r, s: estimate(r, chip, s, 8), None, report=quiet)
    own = [c for c in found if c.recipe.batch_size == given.batch_size]
    assert own[0].shape[2] == 1  # tensor parallelism is for what does not fit
    assert own[-1].peak < own[0].peak
    assert all(c.peak * SAFETY <= chip.memory for c in found)
    assert pareto_front(found) == found


def test_estimates_are_scaled_by_what_the_compiled_steps_took_of_theirs() -> None:
    factors = iter([3.0, 2.0, 4.0])

    def compile_fn(recipe: Recipe, shape: Shape) -> tuple[float, float]:
        return 1.0, next(factors) * at_random(recipe, shape).step_s

    others = [c for c in run(compile_fn=compile_fn, compile_best=3) if not c.compiled]
    assert others
    for c in others:
        assert c.step_s == pytest.approx(3.0 * at_random(c.recipe, c.shape).step_s)
