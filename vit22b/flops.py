"""Matmul FLOPs of a model and the peak of a device, for MFU.

A multiply-add counts as two. Norms, softmax and other elementwise work, and whatever rematerialisation
computes again, are not counted: MFU is useful work over peak [Chowdhery 2022, appendix B].
"""

import jax

from vit22b.config import ModelConfig

# Dense bf16 FLOP/s of one device by `device_kind`: the vendors' data sheets (NVIDIA without sparsity; a TPU v2/v3
# device is one core, half a chip; a v4 device is a chip).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known."""
    return PEAK_FLOPS.get(device.device_kind)


def forward_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image's forward pass at the recipe's resolution."""
    d, f, t = config.width, config.mlp_dim, config.num_tokens
    mlp = (3 if config.mlp == "swiglu" else 2) * d * f
    block = 2 * t * (4 * d * d + mlp) + 4 * t * t * d
    embed = 2 * config.grid**2 * 3 * config.patch_size**2 * d
    # Attention pooling: keys and values of all tokens; query, output and MLP of one.
    pool = 2 * t * 2 * d * d + 2 * (2 * d * d + mlp) + 4 * t * d if config.pool == "map" else 0
    return embed + config.depth * block + pool + 2 * d * config.num_classes


def train_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops(config)
