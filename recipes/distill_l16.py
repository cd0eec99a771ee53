"""ViT-L/16 at 384 px learns ImageNet-1k's classes from a frozen teacher: as `distill_b16.py`, which see.

Source: Dehghani et al. 2023 (arXiv 2302.05442), section 4.6.
Command: python launch/tpu.py --config recipes/distill_l16.py --config.distill.teachers="('runs/teacher',)"
Expected: the source reports 89.6 % top-1 from ViT-22B, its student pretrained on JFT. From public teachers: not known.
Not run.
"""

import dataclasses

from distill.config import DistillRecipe
from recipes import distill_b16, vit_l16


def get_config() -> DistillRecipe:
    model = dataclasses.replace(vit_l16.get_config().model, image_size=384, stochastic_depth=0.0, remat="full")
    return distill_b16.student("distill_l16", model)
