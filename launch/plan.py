"""Says whether a recipe fits a cluster, how fast it can go there and what to change; needs none of its devices.

    python launch/plan.py --config recipes/vit22b.py --topology v4:8x8x16 [--json FILE] [--search]

--topology  v4:8x8x16, v5e:16x16, v5p:8x8x8, v6e:16x16: TPU slices, for which the real train step is compiled (needs
            libtpu: pip install -r requirements-tpu.txt); gpu:h200x8x16: 16 servers of 8 GPUs, estimated by formulas;
            cpu:8: compiled for 8 simulated devices, for exact memory classes and collectives, no times.
--json      writes the figures to a new file, with the keys of Plan in vit22b/plan.py.
--search    tries meshes, rematerialisation, batch sizes and momentum dtypes by formulas, compiles the best three, the
            recipe as it is among them, and lists what fits with the flags to paste. What is not compiled is an
            estimate, scaled by what the compiled ones took of theirs.

What the figures mean:
state       parameters, optimizer with EMA, batch, without what a chip's layouts pad. temporaries: gradients,
            activations, gathered weights, at the peak. peak: all together, donated buffers once. GiB of one device.
            GPUs: by formulas, within 11 % of what an H200 took.
compute     matmul FLOPs of the traced step, rematerialised ones included, at the chip's peak. Leaves out norms, softmax
            and other elementwise work, memory traffic, and tiles that do not fill the matrix units.
communication: bytes that collectives bring to a device over its links' rate. Leaves out latencies.
exposed     what of it no compute hides, in the compiled order of instructions with XLA's own time for each of them.
bound       compute + exposed: a run is faster only if it hides more. MFU counts the model's FLOPs, not rematerialised
            ones, as ViT-22B's measured 54.9 % does.
estimate    TPU: the sum of XLA's own estimates, which know memory traffic, plus what is exposed; GPU: formulas
            calibrated on an H200. Both leave out the input pipeline, evaluation, checkpoints and stragglers.

Exit status: 0, the step fits or nothing says that it does not; 1, it does not fit; 2, a mistake, told in one line.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"  # what is planned for need not be here, and a GPU here must not be programmed for

from distill.config import DistillRecipe
from launch.command_line import flag_parser, parse
from vit22b import search, sharding
from vit22b.analytic import estimate
from vit22b.cluster import Cluster, open_cluster
from vit22b.config import Recipe
from vit22b.errors import RecipeError
from vit22b.hardware import GIB
from vit22b.plan import Plan, make_plan


def show(plan: Plan) -> str:
    """The plan as a table for a terminal; what is not known there is left out."""
    mesh = " x ".join(f"{axis} {count}" for axis, count in plan.mesh.items())
    state = ", ".join(f"{name} {short(value)}" for name, value in plan.state_gib_per_device.items())
    rows = [
        ("recipe", f"{plan.recipe}, {plan.params / 1e6:,.1f} M parameters, batch {plan.batch_size:,}"),
        ("devices", f"{plan.devices:,} x {plan.device_kind} ({plan.topology}), mesh {mesh}"),
        ("state", f"{state} GiB per device"),
    ]
    if plan.peak_gib_per_device is not None:
        verdict = {True: "fits", False: "DOES NOT FIT", None: "their limit is not known"}[plan.fits]
        limit = "" if plan.hbm_gib is None else f" of {short(plan.hbm_gib)}"
        rows += [
            ("temporaries", f"{short(plan.temp_gib_per_device)} GiB per device"),
            ("peak", f"{short(plan.peak_gib_per_device)}{limit} GiB per device: {verdict}"),
        ]
    if plan.fits is False:
        rows.append(("try", "--search, a smaller --config.batch_size, --config.model.remat=full, more devices"))
    if plan.compute_s is not None:
        exposed = "" if plan.exposed_s is None else f", {short(plan.exposed_s)} s exposed"
        whole = f"all steps in {short(plan.train_days)} days, {short(plan.chip_hours)} chip-hours"
        rows += [
            ("compute", f"{short(plan.compute_s)} s at peak for {plan.executed_flops_per_step:.3e} FLOPs"),
            ("communication", f"{short(plan.communication_s)} s{exposed}"),
            ("bound", f"{short(plan.step_s_bound)} s a step, MFU at most {100 * (plan.mfu_bound or 0):.1f} %; {whole}"),
        ]
        if plan.step_s_estimate is not None:
            whole = f"all steps in {short(plan.train_days_estimate)} days, {short(plan.chip_hours_estimate)} chip-hours"
            mfu = 100 * (plan.mfu_estimate or 0)
            rows.append(("estimate", f"{short(plan.step_s_estimate)} s a step, MFU {mfu:.1f} %; {whole}"))
    elif plan.fits is None and plan.device_kind.startswith("TPU"):
        rows.append(("speed", f"not known: vit22b/hardware.py has no row for {plan.device_kind}"))
    if plan.compile_s is not None:
        rows.append(("compiled in", f"{plan.compile_s:.0f} s"))
    lines = [f"{name:15} {text}" for name, text in rows]
    if plan.collectives:
        lines += ["", f"{'collectives':20}{'a layer':>9}{'a step':>9}{'async':>9}{'GiB':>9}{'s':>9}{'exposed s':>11}"]
    for kind, row in plan.collectives.items():
        lines.append(
            f"{kind:20}{row['per_layer']:9.0f}{row['total']:9.0f}{row['asynchronous']:9.0f}"
            f"{short(row['bytes_per_step'] / GIB):>9}{short(row['seconds']):>9}{short(row['exposed_seconds']):>11}"
        )
    if plan.blocking_in_layers is not None and plan.collectives:
        blocking = "; ".join(plan.blocking_in_layers) or "none"
        lines += ["", f"blocking collectives above 1 MiB in the layers: {blocking}"]
    return "\n".join(lines)


def short(value: float | None) -> str:
    """Three digits at least."""
    return "?" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def run_search(recipe: Recipe, cluster: Cluster) -> list[search.Candidate]:
    """The best candidates on the cluster, the compiled ones first."""
    chip = cluster.chip
    if chip is None:
        raise RecipeError(f"--search: needs a topology of known speed, not {cluster.name}; for example v4:8x8x16")

    def compile_step(candidate: Recipe, shape: tuple[int, int, int]) -> tuple[float, float]:
        plan = make_plan(candidate, cluster)
        peak = (plan.peak_gib_per_device or 0.0) * GIB
        if not plan.fits:  # XLA's limit is a little below the chip's memory
            peak = max(peak, chip.memory + 1)
        return peak, plan.step_s_estimate or plan.step_s_bound or 0.0

    return search.search(
        recipe,
        cluster.num_devices,
        chip.memory,
        lambda candidate, shape: estimate(candidate, chip, shape, cluster.devices_per_node),
        None if cluster.devices is None else compile_step,
    )


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--topology", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    try:
        arguments, rest = parser.parse_known_args()
        if arguments.topology is None:
            raise RecipeError("--topology: give one, for example --topology v4:8x8x16")
        recipe, workdir = parse([sys.argv[0], *rest])
        if isinstance(recipe, DistillRecipe):
            raise RecipeError(f"--config: {recipe.name} has teachers, which a plan does not count; give a plain recipe")
        if workdir is not None:
            raise RecipeError(f"--workdir={workdir}: a plan writes nothing but --json FILE")
        if arguments.json is not None:
            if arguments.json.exists():
                raise RecipeError(f"--json={arguments.json}: is there already; give a new file")
            if not arguments.json.parent.is_dir():
                raise RecipeError(f"--json={arguments.json}: there is no folder {arguments.json.parent}")
        cluster = open_cluster(arguments.topology)
        recipe.validate()
        sharding.mesh_shape(recipe.mesh, cluster.num_devices)
        if arguments.search:
            found = run_search(recipe, cluster)
            print(search.show(found))
            figures: object = [candidate.figures for candidate in found]
            fits = True
        else:
            plan = make_plan(recipe, cluster)
            print(show(plan))
            figures, fits = dataclasses.asdict(plan), plan.fits is not False
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        return 0 if fits else 1
    except (RecipeError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
