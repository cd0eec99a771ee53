"""What a run says: metrics.jsonl, TensorBoard events, train.log, a progress bar, curves.png.

Only process 0 writes. A terminal gets the bar, anything else plain lines.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tensorboardX
import tqdm

from vit22b.config import Recipe


class Reporter:
    """Turns a train loop's events into records. All times in seconds.

    A logged 'loss' is the mean since the record before; 'images_per_second', 'mfu' (of peak bf16) and
    'data_wait' (share of the time spent waiting for input) exclude evaluation and checkpoints.
    """

    def __init__(self, recipe: Recipe, workdir: Path):
        self._recipe, self._workdir = recipe, workdir
        self._writes = jax.process_index() == 0
        if self._writes:
            torn = (workdir / "metrics.jsonl").exists() and not (workdir / "metrics.jsonl").read_bytes().endswith(b"\n")
            self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._metrics.write("\n" if torn else "")  # a kill may have left half a line
            self._log = open(workdir / "train.log", "a", encoding="utf-8")  # noqa: SIM115
            self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))
        self._bar: tqdm.tqdm | None = None
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def start(self, first_step: int, flops_per_image: int, peak_flops: float | None) -> None:
        """Starts the clock before step `first_step`; `peak_flops` of all devices together, None if unknown."""
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._losses: list[float] = []
        self._waited = self._paused = 0.0
        self._window_start = time.perf_counter()
        if self._writes:
            self._bar = tqdm.tqdm(
                total=self._recipe.total_steps,
                initial=first_step,
                desc=self._recipe.name,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                smoothing=0.1,
            )

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the device's metrics of `step`, and reads those of the step before.

        Thus the host stays one step ahead of the device. Raises as `flush` does.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads the metrics that `step` took last; logs every `log_every_steps`.

        Raises FloatingPointError where loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
            raise FloatingPointError(
                f"step {step}: loss={values['loss']}, gradient_norm={values['gradient_norm']}; its update was not "
                "applied. Start again in a new --workdir, with a lower learning rate or a longer warm-up"
            )
        self._losses.append(values["loss"])
        if self._bar is not None:
            self._bar.update()
        if step % self._recipe.run.log_every_steps == 0 or step == self._recipe.total_steps:
            self._log_step(step, values)

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        seconds = max(time.perf_counter() - self._window_start - self._paused, 1e-9)
        images_per_second = len(self._losses) * self._recipe.batch_size / seconds
        record = {f"train/{name}": value for name, value in values.items()}
        record["train/loss"] = float(np.mean(self._losses))
        record["train/images_per_second"] = images_per_second
        record["train/data_wait"] = self._waited / seconds
        if self._peak_flops is not None:
            record["train/mfu"] = images_per_second * self._flops_per_image / self._peak_flops
        self._losses, self._waited, self._paused = [], 0.0, 0.0
        self._window_start = time.perf_counter()
        short = {"loss": f"{record['train/loss']:.4f}", "img/s": f"{images_per_second:,.0f}"}
        if "train/mfu" in record:
            short["mfu"] = f"{record['train/mfu']:.1%}"
        short["wait"] = f"{record['train/data_wait']:.0%}"
        if self._bar is not None:
            self._bar.set_postfix(short)
        line = f"lr {values['learning_rate']:.2e}  grad {values['gradient_norm']:.3f}"
        text = "  ".join(f"{k} {v}" for k, v in short.items()) + "  " + line
        self._record(step, record, text, on_terminal=not sys.stderr.isatty())  # where there is no bar

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Records validation metrics and redraws the curves."""
        text = "  ".join(f"{k} {v:.4f}" for k, v in results.items() if k != "examples")
        record = {f"validation/{k}": v for k, v in results.items()}
        self._record(step, record, f"validation ({results['examples']} images)  {text}", on_terminal=True)
        if self._writes:
            draw_curves(self._workdir)

    def _record(self, step: int, record: dict[str, float], text: str, on_terminal: bool) -> None:
        if not self._writes:
            return
        print(json.dumps({"step": step, "time": round(time.time(), 3), **record}), file=self._metrics, flush=True)
        for name, value in record.items():
            self._events.add_scalar(name, value, step)
        self.note(f"step {step:>7}/{self._recipe.total_steps}  {text}", on_terminal)

    def note(self, text: str, on_terminal: bool = True) -> None:
        """A line for train.log, and for the terminal, above the bar where there is one."""
        if not self._writes:
            return
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self._log, flush=True)
        if on_terminal:
            tqdm.tqdm.write(text, file=sys.stderr if sys.stderr.isatty() else sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writes:
            for file in (self._metrics, self._log, self._events):
                file.close()


def read_metrics(workdir: Path) -> dict[str, dict[int, float]]:
    """{'train/loss': {step: value}, ...} from metrics.jsonl; what a resumed run repeated counts once."""
    series: dict[str, dict[int, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # half a line, as a kill leaves it
            continue
        for name in record.keys() - {"step", "time"}:
            series.setdefault(name, {})[record["step"]] = record[name]
    return series


def was_evaluated(workdir: Path, step: int) -> bool:
    """Whether metrics.jsonl has the evaluation of a step."""
    return step in read_metrics(workdir).get("validation/top1", {})


def draw_curves(workdir: Path) -> None:
    """Draws loss, accuracy and learning rate over steps from metrics.jsonl into curves.png."""
    import matplotlib  # slow to import, and needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = read_metrics(workdir)
    panels = {
        "loss": ["train/loss", "validation/loss"],
        "validation accuracy": ["validation/top1", "validation/top5"],
        "learning rate": ["train/learning_rate"],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            if name in series:
                steps = sorted(series[name])
                axis.plot(steps, [series[name][s] for s in steps], label=name, marker="." if len(steps) < 30 else "")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(workdir / "curves.png", dpi=120)
    pyplot.close(figure)
