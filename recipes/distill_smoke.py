"""Distils the digits: a small student learns from `recipes/smoke.py`'s model, with labels for few of its images.

Source: function matching [Beyer 2022]; the sizes are this project's.
Data: scikit-learn's digits.
Command: python launch/tpu.py --config recipes/smoke.py
    python launch/tpu.py --config recipes/distill_smoke.py
Not run.
"""

import dataclasses

from distill.config import DistillConfig, DistillRecipe
from recipes import smoke


def get_config() -> DistillRecipe:
    base = smoke.get_config()
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    model = dataclasses.replace(base.model, width=48, depth=2, mlp_dim=192, num_heads=3)
    data = dataclasses.replace(base.data, mixup=1.0)
    return DistillRecipe(
        **fields | {"name": "distill_smoke", "model": model, "data": data},
        distill=DistillConfig(teachers=("runs/smoke",), matmul="fp32"),
    )
