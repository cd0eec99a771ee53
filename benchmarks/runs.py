"""Many runs of launch/tpu.py, some at a time, and what they ended with: for comparing recipes."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vit22b.report import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = 2  # launch/tpu.py's exit status for that, too


class Places:
    """`jobs` runs at a time on each of `gpus` devices. One device is left as it is found, and may be anything."""

    def __init__(self, jobs: int, gpus: int) -> None:
        self._jobs, self._gpus = jobs, gpus
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(jobs * gpus):
            self._free.put(place % gpus)

    def train(self, workdir: Path, flags: list[str]) -> None:
        """One run to its end, in its part of a GPU's memory, once a place is free. Raises CalledProcessError unless it
        ended well or diverged.
        """
        gpu = self._free.get()
        try:
            own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / self._jobs:.3f}"}
            own |= {"CUDA_VISIBLE_DEVICES": str(gpu)} if self._gpus > 1 else {}
            done = subprocess.run(
                [sys.executable, str(ROOT / "launch" / "tpu.py"), *flags, "--workdir", str(workdir)],
                env=os.environ | own,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            self._free.put(gpu)
        diverged = done.returncode == DIVERGED and "gradient_norm=" in done.stderr
        if done.returncode and not diverged:
            sys.stderr.write(done.stderr[-2000:])
            raise subprocess.CalledProcessError(done.returncode, done.args)

    def each(self, run: Callable[..., dict], arguments: Iterable[tuple]) -> list[dict]:
        """What `run` gives for each tuple of arguments, in their order; it calls `train` for what needs a place."""

        def shown(each: tuple) -> dict:
            found = run(*each)
            print(json.dumps(found), flush=True)
            return found

        with ThreadPoolExecutor(self._jobs * self._gpus) as pool:
            return list(pool.map(shown, arguments))


def final(workdir: Path) -> dict[str, float | None]:
    """The last validation loss and top-1, None each where the run ended before its last step."""
    series, total = read_metrics(workdir), json.loads((workdir / "recipe.json").read_text())["recipe"]["total_steps"]
    return {name: series.get(f"validation/{name}", {}).get(total) for name in ("loss", "top1")}
