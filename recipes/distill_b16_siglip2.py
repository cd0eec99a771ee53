"""ViT-B/16 learns to see as SigLIP 2 So400m/16 does: its pooled features and its patches', without labels.

Source: Tschannen et al. 2025, "SigLIP 2", for the teacher; matching
    standardised features through a head per teacher is AM-RADIO's, Ranzinger et al. 2024 (arXiv 2312.06709).
Command: python launch/tpu.py --config recipes/distill_b16_siglip2.py
    after: python launch/convert.py --from hf:google/siglip2-so400m-patch16-256 --to runs/siglip2_so400m
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
        name="distill_b16_siglip2",
        model=dataclasses.replace(base.model, image_size=256, num_registers=4),
        distill=DistillConfig(
            teachers=("runs/siglip2_so400m",), match="features", widths=(1152,), teaching="consistent", sharding="fsdp"
        ),
        data=dataclasses.replace(base.data, mixup=0.0),
    )
