"""In which way does a student learn most from a teacher? Trains one, then students in each way, and compares.

    python benchmarks/distill_quality.py --out FOLDER [--steps 2000,10000] [--seeds 3] [--jobs 1] [--gpus 1]
        [--teacher recipes/cifar10.py:30M] [--student recipes/distill_cifar10.py] [--config.FIELD=VALUE ...]

Every run is one of launch/tpu.py in a work directory of its own below FOLDER; the same command goes on with what is
missing. Fields that are given hold for all runs, the teacher's too, but total_steps for the teacher alone: `--steps`
are the students' schedules, each with its own decay. `--jobs` of them run at a time on each of `--gpus` devices. At
the end FOLDER has `distill_quality.json` (final validation top-1 of each run; mean and standard deviation over seeds)
and `distill_quality.png`.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runs import Places, final

TEACHINGS = ("labels", "fixed", "independent", "consistent", "function_matching")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def compare(runs: list[dict]) -> list[dict]:
    """For each schedule and way of teaching: mean and standard deviation of top-1, None where a run diverged."""
    rows = []
    for steps, teaching in itertools.product(sorted({run["steps"] for run in runs}), TEACHINGS):
        found = [run["top1"] for run in runs if (run["steps"], run["teaching"]) == (steps, teaching)]
        known = [value for value in found if value is not None]
        whole = bool(found) and len(known) == len(found)
        rows.append(
            {
                "steps": steps,
                "teaching": teaching,
                "seeds": len(found),
                "top1": statistics.mean(known) if whole else None,
                "deviation": statistics.stdev(known) if whole and len(known) > 1 else None,
            }
        )
    return rows


def plot(folder: Path, rows: list[dict], teacher: float | None) -> None:
    """Top-1 over the length of the schedule: a line for each way of teaching, with the deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for teaching in TEACHINGS:
        own = [row for row in rows if row["teaching"] == teaching and row["top1"] is not None]
        steps, means = [row["steps"] for row in own], [row["top1"] for row in own]
        axis.errorbar(
            steps, means, yerr=[row["deviation"] or 0.0 for row in own], label=teaching, marker="o", capsize=3
        )
    if teacher is not None:
        axis.axhline(teacher, color="black", linestyle=":", label="teacher")
    axis.set(xlabel="steps", ylabel="validation top-1", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(folder / "distill_quality.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="recipes/cifar10.py:30M")
    parser.add_argument("--student", default="recipes/distill_cifar10.py")
    parser.add_argument("--steps", default="2000,10000", type=numbers)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    arguments, fields = parser.parse_known_args()
    places = Places(arguments.jobs, arguments.gpus)
    teacher = arguments.out / "teacher"
    places.train(teacher, ["--config", arguments.teacher, *fields])
    best = final(teacher)
    print(json.dumps({"name": "teacher", **best}), flush=True)

    def run(steps: int, seed: int, teaching: str) -> dict:
        name = f"{teaching}_{steps}_seed{seed}"
        flags = ["--config", f"{arguments.student}:{teaching}", *fields, f"--config.seed={seed}"]
        flags += [f"--config.total_steps={steps}", f"--config.run.checkpoint_every_steps={steps}"]
        if teaching != "labels":
            flags.append(f"--config.distill.teachers=('{teacher}',)")
        places.train(arguments.out / name, flags)
        return {"name": name, "steps": steps, "seed": seed, "teaching": teaching, **final(arguments.out / name)}

    runs = places.each(run, itertools.product(arguments.steps, range(arguments.seeds), TEACHINGS))
    rows = compare(runs)
    result = {"teacher": {"config": arguments.teacher, **best}, "student": arguments.student, "fields": fields}
    result |= {"runs": runs, "comparison": rows}
    (arguments.out / "distill_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(arguments.out, rows, best["top1"])
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
