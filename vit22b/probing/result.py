"""What a probe found: for results.json, for the terminal, and for the page."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit22b.probing.scoring import Score, interval

HOLDOUT = "holdout"
FEW_SHOT, PARTS = "Few-shot", "Parts of the error"  # what titles of tables begin with
OPTIMISTIC = "Settings were chosen on the reported set itself: its figures are optimistic."


@dataclasses.dataclass(frozen=True)
class ImageSet:
    source: str
    images: int
    fingerprint: str
    content: str  # a hash of images, as `vit22b/probing/sets.py` says


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried."""

    settings: dict[str, object]  # 'feature' and others
    # On the set that settings are chosen on: 'top1', 'top5', 'loss', 'ece', 'examples'; NaN for what means nothing.
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Reported:
    """A classifier on a set of images."""

    metrics: dict[str, float]  # as of a trial
    interval: tuple[float, float]  # 95 %, of top1
    bins: list[list[float]]  # of each bin of confidence: images, mean confidence, accuracy; none without an 'ece'


def reported(score: Score, meaningless: tuple[str, ...]) -> Reported:
    bins = [] if "ece" in meaningless else score.bins.tolist()
    return Reported(meaningful(score.metrics, meaningless), interval(score.correct_N), bins)


def meaningful(metrics: dict[str, float], meaningless: tuple[str, ...]) -> dict[str, float]:
    return metrics | dict.fromkeys(meaningless, math.nan)


@dataclasses.dataclass(frozen=True)
class MethodResult:
    trials: list[Trial]
    winner: int  # among the trials
    reported: Reported  # the winner
    seconds: float

    @property
    def best(self) -> Trial:
        return self.trials[self.winner]


@dataclasses.dataclass(frozen=True)
class FewShot:
    feature: str
    shots: int  # training images of each class, or all of one that has fewer
    mean: float  # of top1 over seeds
    top1: list[float]  # of each seed


@dataclasses.dataclass(frozen=True)
class FurtherSet:
    """A set of --also, under the overall winner."""

    name: str
    images: ImageSet
    reported: Reported


@dataclasses.dataclass(frozen=True)
class ErrorParts:
    """What the error of the best linear method comes from, which need not be the winner."""

    method: str
    settings: dict[str, object]
    # 'approximation' (may be None), 'usability', 'probe_generalization', 'encoder_generalization', 'total'.
    parts: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    model: str  # as named on the command line
    model_hash: str
    preprocessing: dict[str, object]  # how images become features
    protocol: str
    settings: dict[str, object]  # every flag
    train: ImageSet
    holdout: ImageSet | None
    validation: ImageSet  # the reported set
    selected_on: str  # 'holdout', or 'validation'
    methods: dict[str, MethodResult]  # at least one
    few_shot: list[FewShot]
    further: list[FurtherSet]
    decomposition: ErrorParts | None
    remarks: list[str]  # what is to be known beside the figures
    seconds: dict[str, float]  # by phase

    @property
    def winner(self) -> str:
        """The method whose best trial has the highest top-1 where settings were chosen; of equal ones the first."""
        return max(self.methods, key=lambda name: self.methods[name].best.metrics["top1"])


def to_json(result: ProbeResult) -> dict[str, Any]:
    """Of lists, dicts with text as keys, numbers, texts, booleans and None, which also stands for NaN and infinity."""
    return _plain(dataclasses.asdict(result) | {"winner": result.winner})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class Table:
    """A part of the result as text: rows of cells under a header."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def is_numeric(self, column: int) -> bool:
        return all(re.fullmatch(r"([-–\d.,\s]|inf)*", row[column]) for row in self.rows)


def facts(result: ProbeResult) -> list[str]:
    """What was probed, and how: a line each."""
    chosen = "on held-out training images" if result.selected_on == HOLDOUT else f"on {result.validation.source}"
    return [
        f"{result.model}, parameters {result.model_hash}, {describe(result.preprocessing)}",
        f"protocol {result.protocol}, settings and method (*) chosen {chosen}, reported on {result.validation.source}",
        *cautions(result),
    ]


def cautions(result: ProbeResult) -> list[str]:
    """What limits the figures: a line each."""
    return [*([OPTIMISTIC] if result.selected_on != HOLDOUT else []), *result.remarks]


def tables(result: ProbeResult) -> list[Table]:
    """All but single trials; accuracies in per cent. The winner's row is marked by '*'."""
    chosen = "held out" if result.selected_on == HOLDOUT else "selection"
    scores = ["top-1", "95 % interval", "top-5", "loss", "ECE"]
    by_method = [
        [
            name + " *" * (name == result.winner),
            percent(found.best.metrics["top1"]),
            *score_cells(found.reported),
            str(len(found.trials)),
            f"{found.seconds:.1f}",
            describe(found.best.settings),
        ]
        for name, found in result.methods.items()
    ]
    few_shot = [[str(few.shots), percent(few.mean), ", ".join(map(percent, few.top1))] for few in result.few_shot]
    further = [
        [each.name, *score_cells(each.reported), f"{each.reported.metrics['examples']:,}", each.images.source]
        for each in result.further
    ]
    parts = result.decomposition.parts.items() if result.decomposition else ()
    error = [[name.replace("_", " "), "–" if part is None else percent(part)] for name, part in parts]
    sets = {"training": result.train, "held out": result.holdout, "reported": result.validation}
    sets |= {each.name: each.images for each in result.further}
    images = [[name, f"{each.images:,}", each.source, each.fingerprint] for name, each in sets.items() if each]
    feature = result.few_shot[0].feature if result.few_shot else ""
    found = [
        Table("Methods", ["method", chosen, *scores, "tried", "seconds", "chosen settings"], by_method),
        Table(f"{FEW_SHOT}, {feature}", ["images per class", "top-1", "of each seed"], few_shot),
        Table("Further sets", ["set", *scores, "images", "source"], further),
        Table(f"{PARTS}{of_head(result)}", ["part", "points"], error),
        Table("Images", ["set", "images", "source", "fingerprint"], images),
        Table("Time", ["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in result.seconds.items()]),
    ]
    return [each for each in found if each.rows]


def of_head(result: ProbeResult) -> str:
    """Whose error it is that has parts."""
    if result.decomposition is None:
        return ""
    method = result.decomposition.method
    other = "" if method == result.winner else f" (not the winner, {result.winner}, which is not linear)"
    return f" of {method}{other}, {describe(result.decomposition.settings)}"


def trials(method: MethodResult) -> Table:
    """Every setting, best first."""
    rows = []
    for trial in sorted(method.trials, key=lambda trial: -trial.metrics["top1"]):
        top1, top5, loss, ece = (trial.metrics[name] for name in ("top1", "top5", "loss", "ece"))
        rows.append([*map(text, trial.settings.values()), percent(top1), percent(top5), decimals(loss), decimals(ece)])
    return Table(f"All {len(rows)} tried", [*method.best.settings, "top-1", "top-5", "loss", "ECE"], rows)


def score_cells(of: Reported) -> list[str]:
    low, high = of.interval
    top1, top5, loss, ece = (of.metrics[name] for name in ("top1", "top5", "loss", "ece"))
    return [percent(top1), f"{percent(low)} – {percent(high)}", percent(top5), decimals(loss), decimals(ece)]


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def decimals(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def printable(text: str) -> str:
    """With replacement characters for what is no text, as names of files may hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def describe(settings: Mapping[str, object]) -> str:
    """As in 'learning_rate 0.1, epochs 10'."""
    return ", ".join(f"{name} {text(value)}" for name, value in settings.items())


def text(value: object) -> str:
    """A setting's value."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(result: ProbeResult) -> str:
    """The result for a terminal: plain text, columns aligned."""
    return "\n".join([*facts(result), *(line for each in tables(result) for line in ["", each.title, *aligned(each)])])


def aligned(of: Table) -> list[str]:
    """Lines of a table; the last column may be long."""
    columns = []
    for number, cells in enumerate(zip(of.header, *of.rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if of.is_numeric(number) else cell.ljust(width) for cell in cells])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
