"""Reads a compiled step: which collectives it holds, whether they run beside compute, and how long all that takes.

The text of a compiled module lists a computation's instructions in the order in which they run. `Replay` walks through
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

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast"),
    "ragged-all-to-all",
)
ITEM_BYTES = {"pred": 1, "bf16": 2, "token": 0}  # of other types the first number is the bits


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

    def item_bytes(kind: str) -> int:
        bits = re.search(r"\d+", kind)
        return ITEM_BYTES[kind] if kind in ITEM_BYTES else -(-int(bits[0]) // 8) if bits else 0

    return [
        item_bytes(kind) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for kind, dims in re.findall(r"\b([a-z][a-z\d]*)\[([\d,]*)\]", result)
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
    in_layers: bool  # within the loop over layers
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

    `links` says how long a collective takes and what it occupies, `clock` what a cycle is (0: no estimates). Loops that
    run `layer_trips` times, and what is within them, are the layers. Raises ValueError where the module holds
    collectives in places that are not understood.
    """

    def __init__(self, module: Module, num_devices: int, links: Links | None, clock: float, layer_trips: int):
        self.collectives: list[Collective] = []
        self._module, self._num_devices, self._links, self._clock = module, num_devices, links, clock
        self._layer_trips = layer_trips
        self._seen: set[str] = set()
        self.seconds = self._run(module.entry, runs=1, in_layers=False)
        for name, instructions in module.computations.items():
            lost = [i.name for i in instructions if i.opcode.removesuffix("-start") in KINDS]
            if lost and name not in self._seen:
                raise ValueError(f"{name}: {', '.join(lost)} would not be counted")

    def _run(self, name: str, runs: int, in_layers: bool) -> float:
        """Seconds that one execution of a computation takes; notes its collectives as executed `runs` times."""
        self._seen.add(name)
        now = busy = 0.0
        free: dict[Hashable, float] = {}  # when each link is free again
        under_way: dict[str, tuple[Collective, float, float]] = {}  # by name: end on the links, `busy` at the start
        for i in self._module.computations[name]:
            collective = self._collective_in(i)
            first = i.operands[0] if i.operands else ""
            if i.opcode in ("while", "call", "conditional"):
                seconds = self._run_called(i, runs, in_layers)
                now, busy = now + seconds, busy + seconds
            elif collective is not None and first not in under_way:
                started = i.opcode.endswith("-start")
                found, occupied = self._measure(i, collective, runs, in_layers, started)
                self.collectives.append(found)
                if started:
                    begin = max([now, *(free.get(link, 0.0) for link in occupied)])
                    end = begin + found.seconds
                    free |= dict.fromkeys(occupied, end)
                    under_way[i.name] = (found, end, busy)
                else:  # at once: its packets pass between those under way
                    found.exposed = found.seconds
                    now += found.seconds
            elif i.opcode.endswith("-update") and first in under_way:
                under_way[i.name] = under_way.pop(first)
            elif i.opcode.endswith("-done") and first in under_way:
                found, end, busy_before = under_way.pop(first)
                found.beside, found.exposed = busy - busy_before, max(end - now, 0.0)
                now = max(now, end)
            elif self._clock:
                seconds = i.cycles / self._clock
                now, busy = now + seconds, busy + seconds
        for found, end, busy_before in under_way.values():  # what ends elsewhere, such as in a loop's next iteration
            found.beside, found.exposed = busy - busy_before, max(end - now, 0.0)
            now = max(now, end)
        return now

    def _run_called(self, i: Instruction, runs: int, in_layers: bool) -> float:
        """Seconds of a loop, of a call, or of the longest branch."""
        if i.opcode == "while":
            trips = trip_count(self._module, i)
            in_layers = in_layers or trips == self._layer_trips
            return trips * self._run(i.attribute("body") or "", runs * trips, in_layers)
        if i.opcode == "call":
            return self._run(i.attribute("to_apply") or "", runs, in_layers)
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names += [n for side in ("true", "false") if (n := i.attribute(f"{side}_computation"))]
        return max((self._run(name, runs, in_layers) for name in names), default=0.0)

    def _collective_in(self, i: Instruction) -> tuple[str, Instruction] | None:
        """The kind of collective that an instruction is, or contains, and the collective itself."""
        if i.opcode.removesuffix("-start") in KINDS:
            return i.opcode.removesuffix("-start"), i
        if i.opcode not in ("fusion", "async-start", "call-start"):
            return None
        called = i.attribute("calls") or i.attribute("to_apply") or ""
        for inner in self._module.computations.get(called, []):
            if (found := self._collective_in(inner)) is not None:
                self._seen.add(called)
                kind = found[0]
                # TPUs: an all-reduce of which each device keeps a slice.
                return "reduce-scatter" if kind == "all-reduce" and "scatter" in called else kind, found[1]
        return None

    def _measure(
        self, i: Instruction, collective: tuple[str, Instruction], runs: int, in_layers: bool, started: bool
    ) -> tuple[Collective, Collection[Hashable]]:
        kind, inner = collective
        sizes = array_bytes(i.result if i.opcode == "fusion" else inner.result)
        if inner.opcode.endswith("-start") and inner.opcode != "all-reduce-start":
            count = len(inner.operands)
            sizes = sizes[count : 2 * count]  # the result holds operands, results and flags
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", inner.attributes)
            peers = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""), dtype=int)
            members = 2
        else:
            peers = groups_of(inner.attributes, self._num_devices)
            members = peers.shape[1]
        received_bytes = received(kind, sum(sizes), members)
        if self._links is None:
            return Collective(kind, i.name, received_bytes, runs, in_layers, started, 0.0), ()
        seconds, occupied = self._links.seconds(kind, received_bytes, peers)
        return Collective(kind, i.name, received_bytes, runs, in_layers, started, seconds), occupied
