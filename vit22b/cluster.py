"""Machines that need not be there: TPU slices, GPU clusters and simulated CPUs by name, and a TPU's links.

v4:8x8x16         a TPU slice: generation and torus of chips; what libtpu knows (v2, v3, v4, v5e, v5p, v6e, ...)
gpu:h200x8x16     16 servers with 8 GPUs each; a100, h100, h200, ...; gpu:h200x8 is one server
cpu:8             8 simulated devices of this machine
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Collection, Hashable

import jax
import numpy as np
from jax.experimental import topologies

from vit22b.errors import RecipeError
from vit22b.hardware import CHIPS, Chip
from vit22b.sharding import closed_dimensions

GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
}
LARGEST = 16_384  # devices: more than any slice has
EXAMPLES = "v4:8x8x16, v5e:16x16, v5p:8x8x8, v6e:16x16, gpu:h200x8x16, cpu:8"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    name: str
    num_devices: int
    device_kind: str
    chip: Chip | None  # None: nothing known about its speed
    devices_per_node: int  # that are joined by more than the network
    devices: list[jax.Device] | None  # to compile for; None: no compiler here


def open_cluster(name: str) -> Cluster:
    """The cluster of this name; call it before JAX looks for devices. Raises `RecipeError` with what works."""
    jax.config.update("jax_platforms", "cpu")  # whatever is in this machine is not what is planned for
    generation, _, shape = name.partition(":")
    if generation == "cpu":
        return _cpu(name, shape)
    if generation == "gpu":
        return _gpu(name, shape)
    return _tpu(name, generation, shape)


def _cpu(name: str, shape: str) -> Cluster:
    if not shape.isdecimal() or not 1 <= int(shape) <= 512:
        raise RecipeError(f"--topology={name}: cpu: needs a number of devices from 1 to 512, for example cpu:8")
    jax.config.update("jax_num_cpu_devices", int(shape))
    devices = jax.devices()
    count, kind = len(devices), devices[0].device_kind
    if count != int(shape):
        raise RecipeError(f"--topology={name}: JAX has {count} CPU device(s) already; unset XLA_FLAGS")
    return Cluster(name=name, num_devices=count, device_kind=kind, chip=None, devices_per_node=count, devices=devices)


def _gpu(name: str, shape: str) -> Cluster:
    match = re.fullmatch(r"([a-z]+\d+[a-z]*)x(\d+)(?:x(\d+))?", shape)
    if match is None or match[1] not in GPUS or 0 in (int(match[2]), int(match[3] or 1)):
        raise RecipeError(
            f"--topology={name}: needs gpu:KINDxGPUSxSERVERS with KIND one of {', '.join(GPUS)}, as gpu:h200x8x16"
        )
    kind, per_node, nodes = GPUS[match[1]], int(match[2]), int(match[3] or 1)
    if per_node > 8 or per_node * nodes > LARGEST:
        raise RecipeError(f"--topology={name}: at most 8 GPUs per server, which NVLink joins, and {LARGEST} in all")
    return Cluster(
        name=name,
        num_devices=per_node * nodes,
        device_kind=kind,
        chip=CHIPS[kind],
        devices_per_node=per_node,
        devices=None,
    )


def _tpu(name: str, generation: str, shape: str) -> Cluster:
    if not re.fullmatch(r"(tpu)?v\d+[a-z]*", generation) and not generation.startswith("tpu"):
        raise RecipeError(f"--topology={name}: not known; for example {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise RecipeError(f"--topology={name}: compiling for TPUs needs libtpu: pip install -r requirements-tpu.txt")
    dims = [int(n) for n in re.findall(r"\d+", shape)]
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape) or not 0 < math.prod(dims) <= LARGEST:
        raise RecipeError(
            f"--topology={name}: needs the torus of at most {LARGEST} chips behind the colon; for example {EXAMPLES}"
        )
    # No machine's metadata are asked for, several plans may run at once, and libtpu does not warn of the missing TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    options: dict = {"num_slices": 1}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on real v4 machines
    if set(dims) == {1}:  # a host of one chip, instead of the usual four
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        line = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise RecipeError(f"--topology={name}: {line}; for example {EXAMPLES}") from error
    devices: list[jax.Device] = list(topology.devices)
    kind = devices[0].device_kind
    return Cluster(
        name=name,
        num_devices=len(devices),
        device_kind=kind,
        chip=CHIPS.get(kind),
        devices_per_node=len(devices),
        devices=devices,
    )


class Torus:
    """The links between a TPU slice's chips: two in each dimension of the torus, one per direction.

    The answers are lower bounds: routes are shortest, one dimension after
    the other; a collective other than a permute uses all links of the dimensions it spans, evenly.
    """

    def __init__(self, coords: np.ndarray, bandwidth: float):
        """`coords`: (devices, 3), in the order of the mesh; `bandwidth`: bytes/s of a link in one direction."""
        self._coords, self._bandwidth = coords, bandwidth
        self._shape = coords.max(axis=0) + 1
        self._closed = closed_dimensions(self._shape)
        self._known: dict[bytes, tuple[int, frozenset[Hashable]]] = {}

    def seconds(self, kind: str, count: int, peers: np.ndarray) -> tuple[float, Collection[Hashable]]:
        """See `hlo.Links`."""
        if kind == "collective-permute":
            load, links = self._routes(peers)
            return count * load / self._bandwidth, links
        members = self._coords[peers[0]]
        ways: set[tuple[int, int]] = set()  # dimension and direction
        for dim in range(3):
            spanned = len(set(members[:, dim].tolist()))
            if spanned > 1:
                ways.add((dim, 1))
                if spanned == self._shape[dim] and self._closed[dim]:
                    ways.add((dim, -1))
        everywhere = {(*way, *chip) for way in ways for chip in self._coords.tolist()}
        return count / (self._bandwidth * max(len(ways), 1)), everywhere

    def _routes(self, pairs: np.ndarray) -> tuple[int, frozenset[Hashable]]:
        """The most messages on one link, and the links (dimension, direction, chip) in use, of messages in pairs."""
        key = pairs.tobytes()
        if key not in self._known:
            loads: collections.Counter = collections.Counter()
            for source, target in self._coords[pairs].tolist():
                for dim, size in enumerate(self._shape.tolist()):
                    way = target[dim] - source[dim]
                    if self._closed[dim] and abs(way) > size / 2:
                        way -= size if way > 0 else -size
                    step = 1 if way > 0 else -1
                    for _ in range(abs(way)):
                        loads[dim, step, *source] += 1
                        source[dim] = (source[dim] + step) % size
            self._known[key] = max(loads.values(), default=0), frozenset(loads)
        return self._known[key]
