"""ViT-B/16 learns to see as DINOv3 ViT-7B/16 does: its pooled features and its patches', without labels.

Source: Simeoni et al. 2025, "DINOv3" (whose students learn by the teacher's own losses; here they match its features);
    matching standardised features through a head per teacher is AM-RADIO's, Ranzinger et al. 2024 (arXiv 2312.06709).
Command: python launch/tpu.py --config recipes/distill_b16_dinov3.py
    after: python launch/convert.py --from hf:facebook/dinov3-vit7b16-pretrain-lvd1689m --to runs/dinov3_7b
Expected: not known. The validation accuracy in the log is that of a linear classifier that learns from labels on the
    student's pooled features, and from which nothing flows back.
Not run.
"""

import dataclasses

from distill.config import DistillConfig, DistillRecipe
from recipes import distill_b16


def get_config() -> DistillRecipe:
    base = distill_b16.get_config()
    return dataclasses.replace(
        base,
        name="distill_b16_dinov3",
        model=dataclasses.replace(base.model, image_size=256, num_registers=4),
        distill=DistillConfig(
            teachers=("runs/dinov3_7b",), match="features", widths=(4096,), teaching="consistent", sharding="fsdp"
        ),
        data=dataclasses.replace(base.data, mixup=0.0),
    )
