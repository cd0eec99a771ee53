"""Where the time of a step goes: a profiler's events, each put down to a part of the model and a kind of kernel.

An event names the instruction of the compiled module that it runs. The instruction's `op_name` holds the scopes
(`jax.named_scope`) under which it was traced, in the backward pass too: `jit(train_step)/transpose(jvp(mlp))/...`.
"""

import collections
import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from vit22b import hlo

# The scopes of layers.py, model.py and step.py, and around a whole model in distill/teaching.py.
REGIONS = ("embed", "norm", "attention", "mlp", "head", "loss", "optimizer", "input", "teacher")
LONGEST = 40  # kernels that are listed
CONTAINERS = ("while", "call", "conditional")  # what they run has events of its own
MATMUL_KERNEL = re.compile(r"nvjet|gemm|cutlass|xmma|__cublas|__onednn", re.IGNORECASE)
ATTENTION_KERNEL = re.compile(r"cudnn|fmha|flash|attention_(wide_)?(for|back)ward", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One run of a kernel or instruction on a device, in nanoseconds."""

    kernel: str  # the kernel's own name on GPUs, elsewhere the instruction's
    instruction: str  # of the compiled module; '' where the profiler does not say
    start: float
    end: float


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """All runs of one kernel for one region."""

    name: str
    region: str
    runs: float  # per step
    ms: float  # per step, of all runs together


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the time from the first event to the last one's end; `regions` and `kinds` sum to 1 each."""

    regions: dict[str, float]  # REGIONS, 'other', 'communication', 'idle': those that occur
    kinds: dict[str, float]  # 'matmul', 'attention', 'elementwise', 'communication', 'idle': those that occur
    kernels: list[Kernel]  # those that take most time, longest first


class Labels:
    """The region and the kind of each event of a compiled module."""

    def __init__(self, text: str) -> None:
        """`text`: of the compiled module. Raises ValueError where it is not one."""
        self._computations = hlo.parse(text).computations
        self._instructions = {i.name: i for body in self._computations.values() for i in body}

    def is_container(self, event: Event) -> bool:
        found = self._instructions.get(event.instruction)
        return found is not None and found.opcode in CONTAINERS

    def region(self, event: Event) -> str:
        """One of REGIONS, 'communication', or 'other'."""
        found = self._instructions.get(event.instruction)
        if "nccl" in event.kernel.lower() or (found is not None and self._communicates(found)):
            return "communication"
        return "other" if found is None else self._region(found)

    def kind(self, event: Event) -> str:
        """'communication', 'attention' (a fused kernel), 'matmul' or, for all else, 'elementwise'."""
        found = self._instructions.get(event.instruction)
        if self.region(event) == "communication":
            return "communication"
        names = f"{event.kernel} {event.instruction} {custom_call_target(found)}"
        if ATTENTION_KERNEL.search(names):
            return "attention"
        return "matmul" if MATMUL_KERNEL.search(names) or (found and self._matmuls(found)) else "elementwise"

    def _inside(self, i: hlo.Instruction) -> list[hlo.Instruction]:
        """The instructions of the computation that a fusion or an asynchronous start calls."""
        called = i.attribute("calls") or (i.attribute("to_apply") if i.opcode == "call" else None)
        return self._computations.get(called or "", [])

    def _communicates(self, i: hlo.Instruction) -> bool:
        opcode = re.sub(r"-(start|update|done)$", "", i.opcode)
        return opcode in hlo.KINDS or any(self._communicates(inner) for inner in self._inside(i))

    def _matmuls(self, i: hlo.Instruction) -> list[hlo.Instruction]:
        """The matrix multiplications that an instruction is or contains."""
        if i.opcode in ("dot", "convolution") or MATMUL_KERNEL.search(custom_call_target(i)):
            return [i]
        return [found for inner in self._inside(i) for found in self._matmuls(inner)]

    def _region(self, i: hlo.Instruction) -> str:
        """By its own scopes, else those of its matmuls, else those most frequent in what it calls."""
        own = innermost_scope(i)
        if own is not None:
            return own
        for inner in (self._matmuls(i), self._inside(i)):
            regions = [self._region(each) for each in inner if each is not i]
            known = collections.Counter(region for region in regions if region != "other")
            if known:
                return known.most_common(1)[0][0]
        return "other"


def custom_call_target(i: hlo.Instruction | None) -> str:
    """What a custom call calls, '' for anything else."""
    found = None if i is None else re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return found[1] if found else ""


def innermost_scope(i: hlo.Instruction) -> str | None:
    """The last of REGIONS among the scopes in an instruction's `op_name`, None where there is none; within a teacher
    that. Names of jitted functions are no scopes: a jitted function may be called `norm`.
    """
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    path = re.sub(r"\bp?jit\([^()]*\)", "", found[1]) if found else ""
    scopes = [part for part in re.split(r"[/()]", path) if part in REGIONS]
    return "teacher" if "teacher" in scopes else scopes[-1] if scopes else None


def time_shares(events: Iterable[Event], label: Callable[[Event], str]) -> dict[str, float]:
    """The part of the time from first start to last end that each label has, largest first; they sum to 1.

    Of events that overlap, each has an equal part of the time in which they do; communication has only that in which
    nothing else runs. 'idle': where nothing runs. Empty where no event takes any time.
    """
    changes = [(time, step, label(e)) for e in events if e.end > e.start for time, step in ((e.start, 1), (e.end, -1))]
    changes.sort(key=lambda change: change[0])
    running: collections.Counter[str] = collections.Counter()
    total: dict[str, float] = collections.defaultdict(float)
    for (time, step, name), (following, _, _) in itertools.pairwise(changes):
        running[name] += step
        if following == time:
            continue
        shown = {n: count for n, count in running.items() if count and n != "communication"}
        if not shown:
            shown = {"communication" if running["communication"] else "idle": 1}
        for n, count in shown.items():
            total[n] += (following - time) * count / sum(shown.values())
    whole = sum(total.values())
    return {name: part / whole for name, part in sorted(total.items(), key=lambda item: -item[1])}


def read_events(path: Path) -> list[Event]:
    """The events on the first device of an .xplane.pb file: a GPU's streams, a TPU's core, or a CPU's threads."""
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
    devices = sorted(name for name in planes if re.match(r"/device:(GPU|TPU):\d+$", name))
    plane = planes.get(devices[0] if devices else "/host:CPU")
    if plane is None:
        return []
    events = []
    for line in plane.lines:
        # Other lines of a GPU or TPU repeat the same work by module or by step.
        if devices and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            instruction = stats.get("hlo_op", "")
            if not devices and (not instruction or stats.get("device_ordinal", 0) != 0):
                continue
            if not instruction and line.name == "XLA Ops":  # named by their text: '%fusion.1 = ...'
                instruction = event.name.partition(" ")[0].removeprefix("%")
            events.append(Event(event.name, instruction, event.start_ns, event.start_ns + event.duration_ns))
    return events


def record(run: Callable[[], None]) -> list[Event]:
    """What `run` executes on the first device; `run` waits for it to end. Raises whatever the profiler raises."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # thousands of events that nobody reads
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run()
        finally:
            jax.profiler.stop_trace()
        return [event for path in Path(folder).rglob("*.xplane.pb") for event in read_events(path)]


def compile_for_profile(
    traced: jax.stages.Traced, platform: str, options: dict[str, bool | int | str]
) -> jax.stages.Compiled:
    """The traced function compiled with XLA's `options`, and so that its events carry the names of instructions.

    On GPUs that takes command buffers (CUDA graphs) off, which hide them.
    """
    graphs_off: dict[str, bool | str] = {"xla_gpu_enable_command_buffer": ""} if platform == "gpu" else {}
    return traced.lower().compile(compiler_options=options | graphs_off)


def longest(events: list[Event], region: Callable[[Event], str], steps: int) -> list[Kernel]:
    """The LONGEST kernels of `steps` steps that take most time; those whose names differ in a number alone are one."""
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        name = re.sub(r"[._]\d+$", "", event.kernel)
        times[name, region(event)].append(event.end - event.start)
    found = [Kernel(*key, len(ns) / steps, sum(ns) / steps / 1e6) for key, ns in times.items()]
    return sorted(found, key=lambda kernel: -kernel.ms)[:LONGEST]


def shares(text: str, events: list[Event], steps: int) -> Shares:
    """The tables of the events of `steps` runs of a compiled module, given its text.

    Raises ValueError where there are no events.
    """
    labels = Labels(text)
    events = [event for event in events if not labels.is_container(event)]
    if not any(event.end > event.start for event in events):
        raise ValueError("the profiler recorded no events of the device")
    return Shares(
        regions=time_shares(events, labels.region),
        kinds=time_shares(events, labels.kind),
        kernels=longest(events, labels.region, steps),
    )
