"""Reads a compiled step: which collectives it holds, whether they run beside compute, and how long all that takes.

The text of a compiled module lists a computation's instructions in the order in which they run. `replay` walks through
it with two clocks, the core's and the links': an asynchronous collective occupies links from its start on, and the core
waits at its end for what is left. How long an instruction keeps the core busy is XLA's own estimate (TPUs); links move
bytes at their full rate. So a replay leaves out: what the estimates miss, latency of a hop, congestion that is not
in the torus model, hosts and input.
"""

import dataclasses
import re
from collections.abc import Collection, Hashable
from typing import Protocol

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    opcode: str
    result: str  # type of the result, as text
    arguments: str
    attributes: str  # everything behind the arguments

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str | None:
        """The value of `name=value`, of a computation without its '%'."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def cycles(self) -> int:
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Module:
    """The instructions of each computation of a compiled module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
            # The opcode is the first word behind the type that an opening parenthesis follows.
            if not (body := re.match(r"(.*?) ([a-z][\w\-]*)\((.*)$", found[2])):
                continue
            arguments, _, attributes = body[3].partition(")")
            current.append(Instruction(found[1], body[2], body[1], arguments, attributes))
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled module")
    return Module(computations, entry)


def array_bytes(result: str) -> list[int]:
    """Bytes of each array of a result's type."""
    return [
        ITEM_BYTES.get(kind, 4) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    ]


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a `while` runs: the limit of its counter, which starts at 0. Raises ValueError where none is found."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = list(module.computations[loop.attribute("condition") or ""])
    for instruction in tuple(condition):
        condition += module.computations.get(instruction.attribute("calls") or "", [])
    limits = [int(i.arguments) for i in condition if i.opcode == "constant" and i.arguments.isdecimal()]
    if not limits:
        raise ValueError(f"{loop.name}: a loop of unknown length")
    return max(limits)


@dataclasses.dataclass(slots=True)
class Collective:
    """One collective instruction, in `runs` executions a step."""

    kind: str
    name: str
    bytes: int  # that a device receives in one execution
    runs: int
    in_layers: bool  # within a loop
    asynchronous: bool
    seconds: float  # on the links, one execution
    exposed: float = 0.0  # of these, while the core waits
    beside: float = 0.0  # seconds of compute between start and end


def groups_of(attributes: str, num_devices: int) -> np.ndarray:
    """Devices that communicate with one another, (groups, members), from `replica_groups=`."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in tiled[i].split(",")] for i in (1, 2))
        ids = np.arange(num_devices).reshape(dims)
        return (ids.transpose([int(n) for n in tiled[3].split(",")]) if tiled[3] else ids).reshape(shape)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:\([^)]*\)\s*)?\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        grouped = re.findall(r"'([^']+)'", mesh[2])
        ids = np.arange(num_devices).reshape(list(axes.values()))
        order = [n for n in axes if n not in grouped] + grouped
        members = int(np.prod([axes[n] for n in grouped]))
        return ids.transpose([list(axes).index(n) for n in order]).reshape(-1, members)
    return np.arange(num_devices)[None]


def received(kind: str, result: int, members: int) -> int:
    """Bytes that one device receives at least, from the bytes of its result."""
    others = (members - 1) / members
    share = {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": members - 1, "all-to-all": others}
    return int(result * share.get(kind, 1.0))


class Links(Protocol):
    def seconds(self, kind: str, count: int, peers: np.ndarray) -> tuple[float, Collection[Hashable]]:
        """How long a device takes to receive `count` bytes of a collective, and the links that are busy meanwhile.

        `peers`: (pairs, 2) sources and targets of a collective-permute; (groups, members) of all others.
        """


class Replay:
    """The step as it runs, by XLA's estimates for the core and the links' rates; see the module's docstring.

    `links` says how long a collective takes and what it occupies, `clock` what a cycle is (0: no estimates).
    """

    def __init__(self, module: Module, num_devices: int, links: "Links | None", clock: float):
        self.collectives: list[Collective] = []
        self._module, self._num_devices, self._links, self._clock = module, num_devices, links, clock
        self.seconds = self._run(module.entry, runs=1, in_layers=False)

    def _run(self, name: str, runs: int, in_layers: bool) -> float:
        """Seconds that one execution of a computation takes; notes its collectives as executed `runs` times."""
        now = busy = 0.0
        free: dict[Hashable, float] = {}  # when each link is free again
        under_way: dict[str, tuple[Collective, float, float]] = {}  # by name: end on the links, `busy` at the start
        for i in self._module.computations[name]:
            kind, started = self._collective_in(i)
            if i.opcode == "while":
                trips = trip_count(self._module, i)
                seconds = trips * self._run(i.attribute("body") or "", runs * trips, in_layers=True)
                now, busy = now + seconds, busy + seconds
            elif i.opcode == "call":
                seconds = self._run(i.attribute("to_apply") or "", runs, in_layers)
                now, busy = now + seconds, busy + seconds
            elif kind is not None:
                found, occupied = self._measure(kind, i, runs, in_layers, started)
                self.collectives.append(found)
                if started:
                    begin = max([now, *(free.get(link, 0.0) for link in occupied)])
                    end = begin + found.seconds
                    free |= dict.fromkeys(occupied, end)
                    under_way[i.name] = (found, end, busy)
                else:  # at once: its packets pass between those under way
                    found.exposed = found.seconds
                    now += found.seconds
            elif i.opcode.endswith("-done") and i.operands and i.operands[0] in under_way:
                found, end, busy_before = under_way.pop(i.operands[0])
                found.beside, found.exposed = busy - busy_before, max(end - now, 0.0)
                now = max(now, end)
            elif self._clock:
                seconds = i.cycles / self._clock
                now, busy = now + seconds, busy + seconds
        return now

    def _collective_in(self, i: Instruction) -> tuple[str | None, bool]:
        """The kind of collective that an instruction is, or contains, and whether it only starts it."""
        for kind in KINDS:
            if i.opcode in (kind, f"{kind}-start"):
                return kind, i.opcode.endswith("-start")
        if i.opcode not in ("fusion", "async-start"):
            return None, False
        called = i.attribute("calls") or ""
        for inner in self._module.computations.get(called, []):
            if inner.opcode in KINDS:
                scatters = inner.opcode == "all-reduce" and "scatter" in called  # TPUs: an all-reduce and a slice
                return "reduce-scatter" if scatters else inner.opcode, i.opcode == "async-start"
        return None, False

    def _measure(
        self, kind: str, i: Instruction, runs: int, in_layers: bool, started: bool
    ) -> tuple[Collective, Collection[Hashable]]:
        sizes = array_bytes(i.result)
        if started and kind in ("all-gather", "collective-permute", "all-to-all"):
            sizes = sizes[1:2]  # the result is a tuple: operand, result, and flags
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", i.attributes)
            peers = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""), dtype=int)
            members = 2
        else:
            peers = groups_of(self._attributes(i), self._num_devices)
            members = peers.shape[1]
        count = received(kind, sum(sizes), members)
        if self._links is None:
            return Collective(kind, i.name, count, runs, in_layers, started, 0.0), ()
        seconds, occupied = self._links.seconds(kind, count, peers)
        return Collective(kind, i.name, count, runs, in_layers, started, seconds), occupied

    def _attributes(self, i: Instruction) -> str:
        """Its attributes, or those of the collective inside."""
        inner = self._module.computations.get(i.attribute("calls") or "", [])
        return next((c.attributes for c in inner if c.opcode in KINDS), i.attributes)
