"""Many runs of launch/tpu.py on one device, some at a time, and what they ended with: for comparing recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vit22b.report import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = 2  # launch/tpu.py's exit status for that, too


def train(workdir: Path, flags: list[str], jobs: int) -> None:
    """One run to its end, in its part of a GPU's memory. Raises CalledProcessError unless it ended well or diverged."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "tpu.py"), *flags, "--workdir", str(workdir)],
        env=os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"},
        capture_output=True,
        text=True,
        check=False,
    )
    diverged = done.returncode == DIVERGED and "gradient_norm=" in done.stderr
    if done.returncode and not diverged:
        sys.stderr.write(done.stderr[-2000:])
        raise subprocess.CalledProcessError(done.returncode, done.args)


def final(workdir: Path) -> dict[str, float | None]:
    """The last validation loss and top-1, None each where the run ended before its last step."""
    series, total = read_metrics(workdir), json.loads((workdir / "recipe.json").read_text())["recipe"]["total_steps"]
    return {name: series.get(f"validation/{name}", {}).get(total) for name in ("loss", "top1")}
