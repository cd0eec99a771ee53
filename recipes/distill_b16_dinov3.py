"""ViT-B/16 learns to see as DINOv3 ViT-7B/16 does: its pooled features and its patches', without labels.

Source: Simeoni et al. 2025, "DINOv3" (whose students learn by the teacher's own losses; here they match its features);
    matching standardised features through a head per teacher is AM-RADIO's, Ranzinger et al. 2024 (arXiv 2312.06709).
Command: python launch/tpu.py --config recipes/distill_b16_dinov3.py
    after: python launch/convert.py --from hf:facebook/dinov3-vit7b16-pretrain-lvd1689m --to runs/dinov3_7b
Expected: not known. The validation accuracy in the log is that of a linear classifier that learns from labels on the
    student's pooled features, and from which nothing flows back.
Not run.
"""

from distill.config import DistillRecipe
from recipes import distill_b16


def get_config() -> DistillRecipe:
    return distill_b16.from_features("distill_b16_dinov3", "runs/dinov3_7b", 4096)
