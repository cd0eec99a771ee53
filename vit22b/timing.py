"""How steps are timed; shared by the benchmarks of JAX and of PyTorch, so it imports neither.

A device runs steps one after another while the host queues the next ones. Waiting for every step would add the host's
latency to each of them; so steps are timed in groups, and waited for once per group.
"""

import statistics
import time
from collections.abc import Callable

from vit22b.errors import check

WARM_UP = 3  # steps before the clock starts, each waited for
GROUP = 3  # steps per group


def check_steps(steps: int) -> None:
    """Raises `RecipeError` unless `--steps` makes whole groups."""
    ok = steps >= GROUP and steps % GROUP == 0
    check(ok, "--steps", steps, f"must be a positive multiple of {GROUP}, the steps of a group")


def warm_up(step: Callable[[], None], wait: Callable[[], object]) -> None:
    """Runs `WARM_UP` steps; `step` queues one, `wait` returns once all that is queued has ended."""
    for _ in range(WARM_UP):
        step()
        wait()


def time_groups(step: Callable[[], None], wait: Callable[[], object], steps: int) -> list[float]:
    """Milliseconds per step of each group of `GROUP` steps, `steps` in all (a multiple of `GROUP`)."""
    found = []
    for _ in range(steps // GROUP):
        start = time.perf_counter()
        for _ in range(GROUP):
            step()
        wait()
        found.append(1e3 * (time.perf_counter() - start) / GROUP)
    return found


def spread(ms: list[float]) -> dict[str, float]:
    """Median of the groups' milliseconds per step, and beside it the least, the largest and the quartiles."""
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {
        "step_ms": statistics.median(ms),
        "step_ms_min": min(ms),
        "step_ms_p25": quartiles[0],
        "step_ms_p75": quartiles[2],
        "step_ms_max": max(ms),
    }
