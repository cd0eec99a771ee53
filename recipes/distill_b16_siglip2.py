"""ViT-B/16 learns to see as SigLIP 2 So400m/16 does: its pooled features and its patches', without labels.

Source: Tschannen et al. 2025, "SigLIP 2", for the teacher; matching
    standardised features through a head per teacher is AM-RADIO's, Ranzinger et al. 2024 (arXiv 2312.06709).
Command: python launch/tpu.py --config recipes/distill_b16_siglip2.py
    after: python launch/convert.py --from hf:google/siglip2-so400m-patch16-256 --to runs/siglip2_so400m
Expected: not known. The validation accuracy in the log is that of a linear classifier that learns from labels on the
    student's pooled features, and from which nothing flows back.
Not run.
"""

from distill.config import DistillRecipe
from recipes import distill_b16


def get_config() -> DistillRecipe:
    return distill_b16.from_features("distill_b16_siglip2", "runs/siglip2_so400m", 1152)
