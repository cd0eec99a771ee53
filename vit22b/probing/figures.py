"""Figures of a probe's page: matplotlib draws them, the browser gives them its fonts and the colour of text.

Importing matplotlib takes long, so that only what draws does it.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit22b.probing.result import MethodResult, ProbeResult, describe, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # in figures: whatever colour the page's text has
ACCENT = (0.18, 0.45, 0.74)
PART_COLOURS = ("#2e73bd", "#d98a2b", "#4b9a68", "#9467bd")
NAMED = 50  # classes at most whose names are on the axes of the confusion matrix

LOOK: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.linewidth": 0.6,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # names may hold '$'
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # the same result gives the same page
}


def look() -> contextlib.AbstractContextManager[None]:
    """In force while figures are drawn and written."""
    import matplotlib

    return matplotlib.rc_context(LOOK)


def svg(figure: "Figure") -> str:
    """As wide as the page allows, to be put into HTML."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one that is missing here, while the browser has fonts of its own
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", drawn)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # every figure's are the same
    return drawn.replace(INK, "currentColor")


def _axes(height: float, rows: int = 1, **options: Any) -> tuple["Figure", np.ndarray]:
    """Inches; `rows` axes, one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def _cells(axis: Any, shade: np.ndarray, percentages: np.ndarray) -> None:
    """A picture with a cell for each number: `shade`, 0 to 1, as colour and, where there are few, per cents as text."""
    tint = np.empty((*shade.shape, 4))
    tint[..., :3], tint[..., 3] = ACCENT, shade
    axis.imshow(tint, aspect="auto", interpolation="none")
    axis.tick_params(length=0)
    axis.spines[:].set(visible=True, alpha=0.4)
    if shade.shape[1] <= 15:
        for (row, column), value in np.ndenumerate(percentages):
            colour = "white" if shade[row, column] > 0.75 else INK
            label = "" if np.isnan(value) else f"{value:.1f}"
            axis.text(column, row, label, color=colour, size=min(8, 110 / shade.shape[1]), ha="center", va="center")


def grid(method: MethodResult) -> "Figure | None":
    """Top-1 over the two settings with the most values, with axes of their own for each choice of the others."""
    from matplotlib.patches import Rectangle

    names = [name for name in method.best.settings if name != "steps"]  # which follow from the epochs
    values = {name: list(dict.fromkeys(t.settings[name] for t in method.trials)) for name in names}
    varying = sorted((name for name in values if len(values[name]) > 1), key=lambda name: -len(values[name]))
    if not varying:
        return None
    across, down, *others = varying if len(varying) > 1 else [*varying, next(n for n in values if n != varying[0])]
    grids: dict[str, np.ndarray] = {}
    places = []
    for trial in method.trials:
        title = describe({name: trial.settings[name] for name in others})
        grid = grids.setdefault(title, np.full((len(values[down]), len(values[across])), np.nan))
        places.append((title, values[down].index(trial.settings[down]), values[across].index(trial.settings[across])))
        grid[places[-1][1:]] = 100 * trial.metrics["top1"]
    rows, columns = len(values[down]), len(values[across])
    step = -(-columns // 15)  # labels at most
    labels = [_short(text(value), 24) for value in values[across][::step]]
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if columns > 6 else {}
    below = 0.05 * max(map(len, labels)) if slanted else 0
    figure, axes = _axes(0.8 + below + len(grids) * (0.35 + 0.27 * rows), len(grids), sharex=True)
    # Settings that fail altogether would leave no difference of colour to the others.
    low, high = np.nanquantile(list(grids.values()), [0.2, 1])
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        _cells(axis, np.nan_to_num(np.clip((grid - low) / max(high - low, 1e-9), 0, 1)), grid)
        axis.set_title(title, loc="left")
        axis.set_yticks(range(rows), [_short(text(value), 24) for value in values[down]])
        axis.set_ylabel(down)
        if title == places[method.winner][0]:
            _, row, column = places[method.winner]
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, lw=1.5, clip_on=False)
            axis.add_patch(frame)
    axes[-1].set_xticks(range(0, columns, step), labels, **slanted)
    axes[-1].set_xlabel(across)
    return figure


def _short(name: str, most: int) -> str:
    """What leaves a figure its space; `most` is a number of characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def reliability(bins: list[list[float]]) -> "Figure":
    images, confidence, accuracy = np.transpose(bins)
    figure, (above, below) = _axes(4.6, 2, sharex=True, height_ratios=[4, 1])
    left, width = np.arange(len(images)) / len(images), 1 / len(images)
    above.bar(left, accuracy, 0.9 * width, align="edge", color=ACCENT, alpha=0.75)
    above.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    above.plot(confidence[images > 0], accuracy[images > 0], "o", ms=3, color=INK)
    above.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    below.bar(left, 100 * images / images.sum(), 0.9 * width, align="edge", color=INK, alpha=0.35)
    below.set(xlabel="confidence", ylabel="images, %")
    return figure


def confusion(confusion: np.ndarray, names: Sequence[str], block: int) -> "Figure":
    """Squares of `block` classes a side are cells."""
    starts = np.arange(0, len(confusion), block)
    cells = np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1)
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    figure, (axis,) = _axes(5.0)
    shade = np.where(share > 0, 0.2 + 0.8 * np.sqrt(share), 0)  # single images are to be seen
    _cells(axis, shade, 100 * np.where(share > 0, share, np.nan))
    axis.set(xticks=[], yticks=[], xlabel="taken for", ylabel="class")
    if len(names) <= NAMED:
        short = [_short(name, 16) for name in names]
        size = min(8.0, 250 / len(names))
        axis.set_xticks(range(len(names)), short, size=size, rotation=90 if max(map(len, short)) > 2 else 0)
        axis.set_yticks(range(len(names)), short, size=size)
    return figure


def few_shot(result: ProbeResult) -> "Figure":
    figure, (axis,) = _axes(2.8)
    shots = [few.shots for few in result.few_shot]
    axis.plot(shots, [100 * few.mean for few in result.few_shot], "-", color=ACCENT)
    for few in result.few_shot:
        axis.plot([few.shots] * len(few.top1), [100 * top1 for top1 in few.top1], "o", ms=3, color=ACCENT)
    axis.set_xscale("log")
    axis.set_xticks(shots, map(str, shots))
    axis.set_xticks([], minor=True)
    axis.set(xlabel="training images per class", ylabel="top-1, %")
    return figure


def parts(decomposition: Mapping[str, float | None]) -> "Figure":
    """Parts end to end; negative ones to the left of 0."""
    figure, (axis,) = _axes(1.5)
    known = {name: 100 * part for name, part in decomposition.items() if part is not None and name != "total"}
    ends = {True: 0.0, False: 0.0}
    for (name, part), colour in zip(known.items(), PART_COLOURS, strict=False):
        axis.barh(0, part, left=ends[part > 0], color=colour, label=name.replace("_", " "))
        ends[part > 0] += part
    axis.axvline(0, color=INK, lw=0.6)
    axis.set(yticks=[], xlabel="points of error")
    axis.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure
