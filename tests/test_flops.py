"""FLOPs against the published formulas and against what XLA counts in the compiled program."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import MeshFactory

from vit22b.flops import forward_flops, train_flops
from vit22b.hardware import CHIPS, peak_flops
from vit22b.model import ViT
from vit22b.model_config import SIZES, ModelConfig, size

SMALL = ModelConfig(
    width=256, depth=2, mlp_dim=1024, num_heads=4, num_classes=100, image_size=32, patch_size=4, matmul="fp32",
    scan_unroll=2,  # no loop, whose body XLA would count once
)  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_mean_pooled_models_cost_what_the_formula_says(name: str) -> None:
    config = ModelConfig(**size(name, SIZES), num_classes=1000, pool="gap")
    d, f, l = config.width, config.mlp_dim, config.depth
    t, k, c = 256, 14 * 14 * 3, 1000
    expected = t * 2 * l * (4 * d**2 + 2 * d * f) + 4 * l * t**2 * d + 2 * t * k * d + 2 * d * c
    assert forward_flops(config) == expected
    assert train_flops(config) == 3 * expected


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "map"},
        {"pool": "map", "mlp": "swiglu"},
        {"pool": "gap", "mlp": "swiglu"},
        {"block": "sequential", "pool": "cls", "class_token": True, "num_registers": 7},
        {"pool": "cls_gap", "class_token": True},
    ],
    ids=["parallel-map", "swiglu-map", "swiglu-gap", "sequential-cls-registers", "cls-gap"],
)
def test_xla_counts_the_same_and_up_to_3_percent_of_elementwise_work(changes: dict, mesh: MeshFactory) -> None:
    config = dataclasses.replace(SMALL, **changes)
    with mesh():
        model = jax.eval_shape(lambda: ViT(config, jax.random.key(0)))
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        compiled = jax.jit(lambda model, images: model(images).logits).lower(model, images).compile()
    assert 1.0 <= compiled.cost_analysis()["flops"] / forward_flops(config) < 1.03


def test_pooling_costs_keys_and_values_of_all_tokens_and_the_rest_for_one() -> None:
    gap, attention = (forward_flops(dataclasses.replace(SMALL, pool=pool)) for pool in ("gap", "map"))
    d, f, t = 256, 1024, 64
    key_value, query_out, mlp, scores_and_sum = 2 * t * 2 * d**2, 2 * 2 * d**2, 2 * 2 * d * f, 2 * 2 * t * d
    assert attention - gap == key_value + query_out + mlp + scores_and_sum


def test_class_token_and_registers_pass_the_blocks_but_are_not_embedded() -> None:
    config = dataclasses.replace(SMALL, pool="cls", class_token=True, num_registers=7)
    d, f, t = 256, 1024, 64 + 8
    blocks = 2 * (2 * t * (4 * d**2 + 2 * d * f) + 4 * t**2 * d)
    assert forward_flops(config) == blocks + 2 * 64 * (4 * 4 * 3) * d + 2 * d * 100


def test_the_blocks_of_vit_22b_cost_131_gflop_per_token_in_training() -> None:
    """6 per weight of the blocks, and 12 per layer, width and token attended to [Chowdhery 2022, appendix B]."""
    config = ModelConfig(**size("22B", SIZES), num_classes=30_000, pool="gap")
    without_blocks = dataclasses.replace(config, depth=0)
    per_token = (train_flops(config) - train_flops(without_blocks)) / 256
    assert per_token == 6 * 21_743_271_936 + 12 * 48 * 6144 * 256
    assert f"{per_token / 1e9:.1f}" == "131.4"
    # At the paper's 1.15k tokens per second on a TPU v4, that is its MFU of 54.9 %.
    assert f"{1150 * per_token / CHIPS['TPU v4'].peak_flops:.3f}" == "0.549"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("cpu", None),
        ("NVIDIA H2000", None),
        ("", None),
    ],
)
def test_peak_is_the_data_sheets_or_unknown(kind: str, peak: float | None) -> None:
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
