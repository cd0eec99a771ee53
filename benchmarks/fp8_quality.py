"""Does fp8 learn what bf16 learns? Trains both with several seeds and learning rates, and compares.

    python benchmarks/fp8_quality.py --out FOLDER [--rates 1e-3,8e-3] [--seeds 2] [--jobs 1] [--gpus 1]
        [--config recipes/cifar10.py:30M] [--config.FIELD=VALUE ...]

Each run is one of launch/tpu.py in a work directory of its own below FOLDER; the same command goes on with what is
missing. Fields that are given hold for all runs. `--jobs` of them run at a time on each of `--gpus` devices: models as
small as these leave most of a large GPU idle. At the end FOLDER has `fp8_quality.json` (final validation metrics of
each run, means, and the spread over seeds) and `fp8_quality.png` (training loss and validation accuracy of each). A run
that diverges, as one may at the edge of what bf16 bears, is a result: its metrics are null.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runs import Places, final
from vit22b.report import read_metrics

DTYPES = ("bf16", "fp8")


def compare(runs: list[dict]) -> list[dict]:
    """For each rate and metric: mean and range over seeds of each dtype, null where a run diverged; fp8 less bf16."""
    rows: list[dict] = []
    for rate in sorted({run["rate"] for run in runs}):
        for metric in ("loss", "top1"):
            row: dict = {"rate": rate, "metric": metric}
            for dtype in DTYPES:
                found = [run[metric] for run in runs if (run["rate"], run["matmul"]) == (rate, dtype)]
                known = [value for value in found if value is not None]
                row[dtype] = statistics.mean(known) if len(known) == len(found) else None
                row[f"{dtype}_range"] = max(known) - min(known) if len(known) == len(found) else None
            row["difference"] = row["fp8"] - row["bf16"] if None not in (row["fp8"], row["bf16"]) else None
            rows.append(row)
    return rows


def plot(folder: Path, runs: list[dict]) -> None:
    """Training loss and validation top-1 over steps: a panel of each per rate, bf16 in blue and fp8 in orange."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({run["rate"] for run in runs})
    figure, axes = pyplot.subplots(2, len(rates), figsize=(5 * len(rates), 7), squeeze=False, layout="constrained")
    for run in runs:
        series, column = read_metrics(folder / run["name"]), rates.index(run["rate"])
        for row, name in enumerate(("train/loss", "validation/top1")):
            steps = sorted(series.get(name, {}))
            color = "tab:blue" if run["matmul"] == "bf16" else "tab:orange"
            axes[row][column].plot(steps, [series[name][s] for s in steps], color=color, linewidth=0.9, alpha=0.8)
            axes[row][column].set(title=f"learning rate {run['rate']:g}", ylabel=name, xlabel="step")
    figure.savefig(folder / "fp8_quality.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="recipes/cifar10.py:30M")
    parser.add_argument("--rates", default="1e-3,8e-3", type=lambda text: [float(rate) for rate in text.split(",")])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    arguments, fields = parser.parse_known_args()
    places = Places(arguments.jobs, arguments.gpus)

    def run(rate: float, seed: int, matmul: str) -> dict:
        name = f"{matmul}_lr{rate:g}_seed{seed}"
        own = {"seed": seed, "optim.learning_rate": rate, "model.matmul": matmul}
        flags = ["--config", arguments.config, *fields, *(f"--config.{k}={v}" for k, v in own.items())]
        places.train(arguments.out / name, flags)
        return {"name": name, "rate": rate, "seed": seed, "matmul": matmul, **final(arguments.out / name)}

    runs = places.each(run, itertools.product(arguments.rates, range(arguments.seeds), DTYPES))
    result = {"config": arguments.config, "fields": fields, "runs": runs, "comparison": compare(runs)}
    (arguments.out / "fp8_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(arguments.out, runs)
    for row in result["comparison"]:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
