"""A probe's result as one HTML page that needs nothing else: text, tables, and the figures of figures.py as SVG."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit22b.probing import figures
from vit22b.probing.result import (
    FEW_SHOT,
    HOLDOUT,
    PARTS,
    ProbeResult,
    Table,
    cautions,
    facts,
    percent,
    printable,
    tables,
    text,
    trials,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 200  # a side of the confusion matrix's image at most
CONFUSIONS = 20

STYLE = """
:root { color-scheme: light dark; --ink: #1d2025; --soft: #636b75; --line: #dde1e6; --page: #fff; --mark: #fff3d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #98a1ab; --line: #343a41; --page: #16191d; --mark: #3d3217 } }
body { max-width: 50rem; margin: 2.5rem auto; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.5rem 0 .5rem }
p { margin: .3rem 0; overflow-wrap: anywhere } .soft, figcaption { color: var(--soft); font-size: .875rem }
.score { font-size: 2.6rem; font-weight: 600; line-height: 1.2; margin: 1.2rem 0 0 }
.note { background: var(--mark); padding: .5rem .75rem; border-radius: .3rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft) } .number { text-align: right }
td:last-child { white-space: normal; min-width: 9rem; overflow-wrap: anywhere } td.number:last-child { min-width: 0 }
figure { margin: .75rem 0 } figure svg { display: block; width: 100%; height: auto; max-width: 34rem }
figure text { font-family: inherit !important }
details { margin: .75rem 0 } summary { cursor: pointer; color: var(--soft); font-size: .875rem }
"""


def write_page(path: Path, result: ProbeResult, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Writes the page; `confusion` is the overall winner's on the reported set, (C, C), true classes by rows.

    Without names of the classes, `()`, their numbers serve.
    """
    names = [printable(name) for name in class_names]
    names += map(str, range(len(names), len(confusion)))
    with figures.look():
        body = "\n".join(_body(result, confusion, names))
    title = html.escape(f"Probe of {result.model}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )
    path.write_text(printable(page), encoding="utf-8")


def _body(result: ProbeResult, confusion: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    winner = result.methods[result.winner]
    low, high = winner.reported.interval
    methods, *others = tables(result)
    yield f"<h1>Probe of {html.escape(result.model)}</h1>"
    for line in facts(result):
        yield f'<p class="{"note" if line in cautions(result) else "soft"}">{html.escape(line)}</p>'
    yield f'<p class="score">{percent(winner.reported.metrics["top1"])} %</p>'
    yield f"<p>top-1, 95 % interval {percent(low)} – {percent(high)}, by {html.escape(result.winner)}, with</p>"
    yield _html_table(Table("", ["setting", "value"], [[k, text(v)] for k, v in winner.best.settings.items()]))
    yield _section(methods)
    where = "held-out images" if result.selected_on == HOLDOUT else "the reported set"
    for name, method in result.methods.items():
        yield f"<h2>Settings of {html.escape(name)}</h2>"
        yield _figure(figures.grid(method), f"Top-1 in per cent on {where}; the frame marks the chosen settings.")
        yield _details(trials(method))
    if winner.reported.bins:
        yield "<h2>Reliability</h2>"
        caption = "Accuracy by confidence (dots: at the mean confidence), and where the images lie."
        yield _figure(figures.reliability(winner.reported.bins), caption)
    yield "<h2>Confusions</h2>"
    block = -(-len(confusion) // BLOCKS)
    caption = "Part of a class (row) that is taken for another (column), in per cent where there are numbers."
    caption += f" A cell stands for {block} neighbouring classes a side." * (block > 1)
    yield _figure(figures.confusion(confusion, names, block), caption)
    yield _html_table(_most_confused(confusion, names))
    for other in others:
        yield _section(other)
        if other.title.startswith(FEW_SHOT):
            yield _figure(figures.few_shot(result), "Dots are single seeds, the line is their mean.")
        if other.title.startswith(PARTS) and result.decomposition is not None:
            yield _figure(figures.parts(result.decomposition.parts), "Parts that are not known are left out.")
    yield _details(
        Table("All flags", ["flag", "value"], [[name, text(value)] for name, value in result.settings.items()])
    )


def _section(of: Table) -> str:
    return f"<h2>{html.escape(of.title)}</h2>\n{_html_table(of)}"


def _details(of: Table) -> str:
    return f"<details><summary>{html.escape(of.title)}</summary>{_html_table(of)}</details>"


def _html_table(of: Table) -> str:
    style = [' class="number"' * of.is_numeric(column) for column in range(len(of.header))]
    lines = [
        "<tr>" + "".join(f"<{tag}{s}>{html.escape(x)}</{tag}>" for s, x in zip(style, cells, strict=True)) + "</tr>"
        for tag, cells in [("th", of.header), *(("td", row) for row in of.rows)]
    ]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _most_confused(confusion: np.ndarray, names: Sequence[str]) -> Table:
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(flat), len(wrong)) for flat in order if wrong.flat[flat] > 0]
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    rows = [[names[i], names[j], str(wrong[i, j]), percent(share[i, j])] for i, j in pairs]
    return Table("", ["class", "taken for", "images", "% of the class"], rows)


def _figure(figure: "Figure | None", caption: str) -> str:
    if figure is None:
        return ""
    return f"<figure>{figures.svg(figure)}<figcaption>{html.escape(caption)}</figcaption></figure>"
