"""ViT-L/16 on ImageNet-1k alone, by DeiT III's recipe, in 400 or 800 epochs.

Source: as of recipes/vit_b16_i1k.py, of which this is the larger copy.
Command: python launch/tpu.py --config recipes/vit_l16.py:800
    Data as there. Where a step does not fit, it says so before it starts: then --config.optim.accumulate_steps=2 or
    more, or --config.model.remat=full.
Hardware and hours: the source used 4 machines of 8 GPUs, hours not found. The reproduction reports 14 h 10 min for 400
    epochs, at 192 px, on a TPU v4-64.
Expected: the source reports 84.9 % top-1 after 800 epochs (84.5 after 400, as the reproduction quotes it), trained at
    192 px and then for 20 epochs at 224 px. Without LAMB, repeated augmentation and that second phase: not known.
Not run.

Differences from the source: those of recipes/vit_b16_i1k.py.
"""

import dataclasses

from recipes import vit_b16_i1k
from vit22b.config import MeshConfig, Recipe
from vit22b.model_config import SIZES, size

STOCHASTIC_DEPTH = {"400": 0.4, "800": 0.45}


def get_config(arg: str = "800") -> Recipe:
    base = vit_b16_i1k.get_config(arg)
    return dataclasses.replace(
        base,
        name=f"vit_l16_{arg}ep",
        model=dataclasses.replace(base.model, **size("L", SIZES), stochastic_depth=STOCHASTIC_DEPTH[arg]),
        mesh=MeshConfig(data=-1),  # parameters and optimizer state split over the devices
    )
