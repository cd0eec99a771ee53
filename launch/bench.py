"""Times the real train step of a recipe on the devices of this machine, and says where the time goes.

    python launch/bench.py --config recipes/bench.py:L16 [--config.FIELD=VALUE ...] [--input synthetic|real]
        [--steps N] [--kernels N] [--json FILE] [--vs timm [--timm-python PATH] [--timm-mode MODE]]

--input     synthetic (default): one batch of random images lies on the devices. real: batches come from the recipe's
            training source, decoded, augmented and placed as the train loop does it, beside the device's work.
--steps     timed steps, a multiple of 3 (default 30), after 3 that are not timed.
--kernels   prints the N kernels (40 at most) that take most time, too; --json has all 40.
--json      appends the figures to FILE as one line of JSON; benchmarks/table.py makes a table of such lines.
--vs timm   first times timm's model for the same recipe (benchmarks/timm_step.py: PyTorch, torch.compile, bf16
            autocast, fused AdamW) on the same device. --timm-python: that of an environment with torch and timm
            (default: this one). --timm-mode: torch.compile's (default, max-autotune-no-cudagraphs, ...), or 'none'
            to leave it out.

The step is compiled and sharded as in training, its state donated. One process only. What the figures mean:
step        milliseconds a step: the median over groups of 3 steps, each group queued at once and waited for at its end,
            so that the host's latency of one wait is in three steps. In brackets the middle half of the groups, then
            the fastest and the slowest. Leaves out evaluation, checkpoints and logging; with synthetic input the host's
            decoding and its copies too.
MFU         the model's matmul FLOPs (vit22b/flops.py: nothing rematerialised, no elementwise work) over the chips'
            dense bf16 peak (vit22b/hardware.py), whatever the dtype of the matmuls. Not known for other devices.
memory      GiB of one device by the compiler: arguments, temporaries and outputs, donated buffers once. In brackets the
            most that the allocator had in use, where it says, initialisation included.
compile     seconds to trace and compile the step, autotuning included; shorter where a compilation cache is set.
loss        of the last timed step; with synthetic input the same batch each time: it only shows that the step works.
wait        milliseconds a step that the host waited for the next batch (real input).
clock       median of a GPU's clock and power (nvidia-smi's average over a second) while the steps were timed, and the
            reasons for a lower clock as NVML's bits: 0x4 is the power limit.
regions     shares of the time of 3 more steps under the profiler, on the first device, by the model's named scopes;
            backward included. embed; norm; attention (projections, query-key norm, softmax); mlp; head (pooling,
            classifier; the attention and the MLP of attention pooling count as such); loss; optimizer (clipping
            included); input (normalisation, mixing); teacher (all that a distilling run's teachers do); other: what no
            scope covers, such as residual sums; communication: only where nothing else runs; idle: no kernel runs. A
            fused kernel counts for one region.
            On GPUs these steps are compiled again without CUDA graphs, so idle is more than in the timed steps.
kinds       the same time by kind: matmul (cuBLAS, Triton), attention (a fused kernel), elementwise (all else).

Exit status: 0; 2, a mistake, told in one line.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of a GPU, as in launch/tpu.py

import jax

from launch.command_line import flag_parser, parse
from launch.preparation import for_timing, load_teachers
from launch.tpu import check_on_devices
from vit22b import data, sharding
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check, check_choice
from vit22b.measure import measure
from vit22b.profile import LONGEST
from vit22b.timing import check_steps
from vit22b.workdir import git_commit

TIMM_STEP = Path(__file__).resolve().parent.parent / "benchmarks" / "timm_step.py"


def run_timm(argv: list[str], python: str, mode: str, steps: int) -> dict[str, object]:
    """The record of benchmarks/timm_step.py, run to its end before JAX opens the device.

    `argv`: the flags that give the recipe. Raises `RecipeError` with that program's own message where it refuses.
    """
    found = shutil.which(python)
    check(found is not None, "--timm-python", python, "is no program; give the python of an environment with timm")
    # JAX_PLATFORMS=cpu: both on the CPU. Anything else: both on the GPU.
    device = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "cuda"
    command = [str(found), str(TIMM_STEP), *argv]
    command += ["--steps", str(steps), "--mode", mode, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        errors = [line for line in lines if re.match(r"(error|[\w.]*Error): ", line)]  # hints may follow
        raise RecipeError(f"--vs=timm: {(errors or lines)[-1].removeprefix('error: ')}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RecipeError(f"--timm-python={python}: printed no figures; is it a python with torch and timm?") from error


def bench(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, object]:
    """The record of one run on the devices here, without timm's part. Raises `RecipeError`."""
    shape = check_on_devices(recipe)
    devices = jax.devices()
    check(arguments.vs is None or len(devices) == 1, "--vs", arguments.vs, f"needs one device, not {len(devices)}")
    source = data.open_sources(recipe)[0] if arguments.input == "real" else None
    mesh = sharding.make_mesh(shape, devices)
    with jax.set_mesh(mesh):
        recipe, teachers = load_teachers(recipe)
        figures = measure(recipe, mesh, source, arguments.steps, for_timing(recipe, teachers))
    return {
        "recipe": recipe.name,
        "arguments": without_json(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **git_commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(zip(sharding.AXES, shape, strict=True)),
        "matmul": recipe.model.matmul,
        "batch_size": recipe.batch_size,
        "image_size": recipe.model.image_size,
        "tokens": recipe.model.num_tokens,
        "input": arguments.input,
        "steps": arguments.steps,
        **figures,
    }


def without_json(argv: list[str]) -> list[str]:
    """The arguments without `--json FILE`: where a record lies says nothing about it."""
    starts = [i for i, argument in enumerate(argv) if argument == "--json"]
    return [a for i, a in enumerate(argv) if i not in starts and i - 1 not in starts and not a.startswith("--json=")]


def show(record: dict, num_kernels: int) -> str:
    """The record for a terminal, with this many kernels; what is not known is left out."""
    mesh = " x ".join(f"{axis} {count}" for axis, count in record["mesh"].items())
    mfu = "" if record["mfu"] is None else f", MFU {100 * record['mfu']:.1f} %"
    rows = [
        ("recipe", f"{record['recipe']}, {record['params_m']:,.1f} M parameters, {record['matmul']} matmuls"),
        ("batch", f"{record['batch_size']:,} of {record['image_size']} px, {record['tokens']} tokens each"),
        ("devices", f"{record['devices']} x {record['device_kind']}, mesh {mesh}, JAX {record['jax']}"),
        (
            "step",
            f"{record['step_ms']:.2f} ms [{record['step_ms_p25']:.2f} to {record['step_ms_p75']:.2f}; all "
            f"{record['step_ms_min']:.2f} to {record['step_ms_max']:.2f}]",
        ),
        ("speed", f"{record['images_per_second']:,.1f} images/s{mfu}"),
    ]
    if record["peak_gib"] is not None:
        in_use = "" if record["device_peak_gib"] is None else f" [{record['device_peak_gib']:.2f} in use]"
        rows.append(("memory", f"{record['peak_gib']:.3g} GiB per device{in_use}"))
    rows += [("compile", f"{record['compile_s']:.1f} s"), ("loss", f"{record['loss']:.4f}")]
    if record["data_wait_s"] is not None:
        rows.append(("wait", f"{1e3 * record['data_wait_s']:.2f} ms a step for the next batch"))
    if record["sm_clock_mhz"] is not None:
        rows.append(
            (
                "clock",
                f"{record['sm_clock_mhz']:.0f} MHz, {record['power_w']:.0f} W, limited by {record['throttle_reasons']}",
            )
        )
    for title, table in (("regions", record["regions"]), ("kinds", record["kinds"])):
        if table is not None:
            rows.append((title, ", ".join(f"{name} {100 * share:.1f} %" for name, share in table.items())))
    if record["profile_error"] is not None:
        rows.append(("regions", f"not known: {record['profile_error']}"))
    if record["timm"] is not None:
        timm = record["timm"]
        rows.append(
            (
                "timm",
                f"{timm['images_per_second']:,.1f} images/s, {timm['params_m']:,.1f} M parameters, timm "
                f"{timm['timm']}, torch {timm['torch']}; ours / timm: {record['vs_timm']:.3f}",
            )
        )
    lines = [f"{name:10} {text}" for name, text in rows]
    if num_kernels and record["kernels"] is not None:
        lines += ["", "   ms a step    runs  region         kernel"]
        for kernel in record["kernels"][:num_kernels]:
            lines.append(f"{kernel['ms']:12.3f}{kernel['runs']:8,.0f}  {kernel['region']:14} {kernel['name'][:80]}")
    return "\n".join(lines)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises `RecipeError` for what is wrong with the program's own flags."""
    check_choice("--input", arguments.input, ("synthetic", "real"))
    if arguments.vs is not None:
        check_choice("--vs", arguments.vs, ("timm",))
        check(arguments.input == "synthetic", "--input", "'real'", "not with --vs timm, whose input is synthetic")
    check_steps(arguments.steps)
    check(0 <= arguments.kernels <= LONGEST, "--kernels", arguments.kernels, f"must be from 0 to {LONGEST}")
    if arguments.json is not None:
        check(not arguments.json.is_dir(), "--json", arguments.json, "is a folder; give a file")
        folder = arguments.json.parent
        check(folder.is_dir(), "--json", arguments.json, f"there is no folder {folder}")


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--input", default="synthetic", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=30, help=argparse.SUPPRESS)
    parser.add_argument("--kernels", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vs", help=argparse.SUPPRESS)
    parser.add_argument("--timm-python", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("--timm-mode", default="default", help=argparse.SUPPRESS)
    try:
        arguments, rest = parser.parse_known_args()
        check_flags(arguments)
        recipe, workdir = parse([sys.argv[0], *rest])
        check(workdir is None, "--workdir", workdir, "a benchmark writes nothing but --json FILE")
        recipe.validate()
        timm = None
        if arguments.vs is not None:
            timm = run_timm(rest, arguments.timm_python, arguments.timm_mode, arguments.steps)
        record = bench(recipe, arguments) | {"timm": timm, "vs_timm": None}
        if timm is not None:
            record["vs_timm"] = record["images_per_second"] / timm["images_per_second"]  # type: ignore[operator]
        print(show(record, arguments.kernels))
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return 0
    except (RecipeError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
