"""What a chip can do at most, by `device_kind`, as its vendor or a document says; nothing here was measured.

Where a TPU's device is one of a chip's two cores (v2, v3), the row is the core's half of the chip. Sources:
    TPUs: cloud.google.com/tpu/docs, one page per generation; bandwidth of a link in one direction and clocks from
        Austin et al. 2025, "How to Scale Your Model" (jax-ml.github.io/scaling-book), and for v4 from Jouppi et al.
        2023 (arXiv 2304.01433), Table 4. v6e's clock is not published: it is peak_flops over four units of 256 x 256
        multiply-adds, which rule gives the published clocks of v4, v5e and v5p with theirs of 128 x 128.
    NVIDIA: the data sheets of A100, H100, H200, L4, L40S (matrix rates without sparsity). `link_bandwidth` is one
        direction of all NVLinks together (of PCIe where there is no NVLink); `network_bandwidth` is one 400 Gbit/s
        network card per GPU (200 Gbit/s for A100), as in the vendor's DGX servers.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this table also serves programs without JAX
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    peak_flops: float  # dense bf16 matmuls, FLOP/s
    memory: float  # bytes of HBM
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float = 0.0  # bytes/s in one direction: TPU, of each link; GPU, of all together
    network_bandwidth: float = 0.0  # bytes/s in one direction between GPU servers, per GPU
    clock: float = 0.0  # Hz; XLA's estimates for TPUs are in its cycles. GPUs: not needed


CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(
        peak_flops=312e12, memory=40 * GIB, memory_bandwidth=1.555e12, link_bandwidth=300e9, network_bandwidth=25e9
    ),
    "NVIDIA A100-SXM4-80GB": Chip(
        peak_flops=312e12, memory=80 * GIB, memory_bandwidth=2.039e12, link_bandwidth=300e9, network_bandwidth=25e9
    ),
    "NVIDIA A100 80GB PCIe": Chip(
        peak_flops=312e12, memory=80 * GIB, memory_bandwidth=1.935e12, link_bandwidth=32e9, network_bandwidth=25e9
    ),
    "NVIDIA L4": Chip(
        peak_flops=121e12, memory=24 * GIB, memory_bandwidth=0.3e12, link_bandwidth=32e9, network_bandwidth=12.5e9
    ),
    "NVIDIA L40S": Chip(
        peak_flops=362e12, memory=48 * GIB, memory_bandwidth=0.864e12, link_bandwidth=32e9, network_bandwidth=25e9
    ),
    "NVIDIA H100 PCIe": Chip(
        peak_flops=756e12, memory=80 * GIB, memory_bandwidth=2.0e12, link_bandwidth=64e9, network_bandwidth=50e9
    ),
    "NVIDIA H100 80GB HBM3": Chip(
        peak_flops=989e12, memory=80 * GIB, memory_bandwidth=3.35e12, link_bandwidth=450e9, network_bandwidth=50e9
    ),
    "NVIDIA H200": Chip(
        peak_flops=989e12, memory=139 * GIB, memory_bandwidth=4.8e12, link_bandwidth=450e9, network_bandwidth=50e9
    ),
    "TPU v2": Chip(peak_flops=22.5e12, memory=8 * GIB, memory_bandwidth=0.35e12, link_bandwidth=31e9, clock=0.7e9),
    "TPU v3": Chip(peak_flops=61.5e12, memory=16 * GIB, memory_bandwidth=0.45e12, link_bandwidth=41e9, clock=0.94e9),
    "TPU v4": Chip(peak_flops=275e12, memory=32 * GIB, memory_bandwidth=1.2e12, link_bandwidth=45e9, clock=1.05e9),
    "TPU v5 lite": Chip(peak_flops=197e12, memory=16 * GIB, memory_bandwidth=0.81e12, link_bandwidth=45e9, clock=1.5e9),
    "TPU v5": Chip(peak_flops=459e12, memory=95 * GIB, memory_bandwidth=2.765e12, link_bandwidth=90e9, clock=1.75e9),
    "TPU v6 lite": Chip(
        peak_flops=918e12, memory=32 * GIB, memory_bandwidth=1.64e12, link_bandwidth=90e9, clock=1.75e9
    ),
}
CHIPS["TPU v5p"] = CHIPS["TPU v5"]  # the same chip; how it is called depends on the version of libtpu

# TPUs with fp8 units: none before this one (cloud.google.com/tpu/docs/tpu7x). Nothing was compiled for it.
FP8_TPUS = ("TPU7x",)


def multiplies_fp8(device: "jax.Device") -> bool:
    """Whether fp8 matmuls gain anything on the device, or it is a CPU, which computes them for tests, slowly.

    NVIDIA GPUs have fp8 units from compute capability 8.9 on: Ada, Hopper, Blackwell (CUDA C++ Programming Guide).
    Other GPUs count as without: AMD's MI300 has fp8 units, but for formats of its own.
    """
    if device.platform == "cpu":
        return True
    if device.platform == "tpu":
        return device.device_kind in FP8_TPUS
    return compute_capability(device) >= (8, 9)


def runs_triton(device: "jax.Device") -> bool:
    """Whether Triton's kernels run on the device: NVIDIA GPUs from compute capability 8.0 on; others were not tried."""
    return device.platform == "gpu" and compute_capability(device) >= (8, 0)


def is_hopper(device: "jax.Device") -> bool:
    """Whether the device is an H100, H200 or GH200, whose own instructions the attention kernel is written in."""
    return device.platform == "gpu" and compute_capability(device) == (9, 0)


def compute_capability(device: "jax.Device") -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of anything else."""
    version = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (0, 0) if version is None else (int(version[1]), int(version[2]))


def peak_flops(device: "jax.Device") -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known."""
    chip = CHIPS.get(device.device_kind)
    return None if chip is None else chip.peak_flops
