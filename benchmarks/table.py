"""Prints a Markdown table of the records that `launch/bench.py --json FILE` wrote, for BENCHMARKS.md.

python benchmarks/table.py FILE.jsonl [FILE.jsonl ...]
"""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

HEADINGS = (
    *("recipe", "batch", "matmul", "img/s", "ms", "middle half, ms", "MFU", "GiB", "compile, s", "MHz"),
    *("vs timm", "jax", "device", "date", "command"),
)


def read_records(path: Path) -> list[dict]:
    """The records of a file of JSON lines. Raises ValueError, with the line, where one is not JSON."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
    return found


def command(arguments: list[str]) -> str:
    """The command line that made a record."""
    return "python launch/bench.py " + shlex.join(arguments)


def row(record: dict) -> list[str]:
    """A record's cells, in the order of HEADINGS; what is not known is empty."""

    def number(key: str, form: str, factor: float = 1.0, unit: str = "") -> str:
        value = record[key]
        return "" if value is None else f"{factor * value:{form}}{unit}"

    return [
        record["recipe"],
        f"{record['batch_size']:,}",
        record["matmul"],
        number("images_per_second", ",.0f"),
        number("step_ms", ",.1f"),
        f"{number('step_ms_p25', ',.1f')} to {number('step_ms_p75', ',.1f')}",
        number("mfu", ".1f", 100, " %"),
        number("peak_gib", ".1f"),
        number("compile_s", ".0f"),
        number("sm_clock_mhz", ",.0f"),
        number("vs_timm", ".2f"),
        record["jax"],
        (f"{record['devices']} x " if record["devices"] > 1 else "") + record["device_kind"],
        record["date"][:10],
        f"`{command(record['arguments'])}`",
    ]


def table(records: Iterable[dict]) -> str:
    """The records as a Markdown table, one row each, in their order."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *(row(record) for record in records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> int:
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths or {"-h", "--help"} & set(sys.argv):
        print(__doc__, file=sys.stdout if paths else sys.stderr)
        return 0 if paths else 2
    try:
        print(table(record for path in paths for record in read_records(path)))
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: a record has no {error}: not written by launch/bench.py", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
