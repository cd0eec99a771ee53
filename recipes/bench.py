"""The 22B architecture at standard sizes, for `launch/bench.py`: `bench.py:NAME` takes B16, L16, So400m14, g14, W6144.

Parallel blocks with query-key normalization per head, mean pooling, 1,000 classes, 224 px, AdamW in fp32, nothing
rematerialised, no loop over the layers. W6144 is the 22B's width with 6 of its 48 layers. THE DATA ARE RANDOM IMAGES,
with which nothing is learned.

Source: sizes from vit22b/model_config.py's SIZES; batches chosen to fill one GPU of 139 GiB.
Command: python launch/tpu.py --config recipes/bench.py:L16
    To time a step: python launch/bench.py --config recipes/bench.py:L16
Measured: only for speed, all on one H200, see BENCHMARKS.md.
"""

from vit22b.config import DataConfig, MeshConfig, OptimConfig, Recipe
from vit22b.errors import check_choice
from vit22b.model_config import SIZES, ModelConfig, size

MODELS = {  # size, patch size, batch size
    "B16": ("B", 16, 512),
    "L16": ("L", 16, 256),
    "So400m14": ("So400m", 14, 192),
    "g14": ("g", 14, 96),
    "W6144": ("22B", 14, 64),
}


def get_config(arg: str = "L16") -> Recipe:
    check_choice("model", arg, tuple(MODELS))
    name, patch_size, batch_size = MODELS[arg]
    shape = size(name, SIZES)
    if arg == "W6144":
        shape["depth"] = 6
    return Recipe(
        name=f"bench_{arg}",
        total_steps=1000,
        batch_size=batch_size,
        model=ModelConfig(
            **shape, num_classes=1000, patch_size=patch_size, qk_norm="head", pool="gap", scan_unroll=shape["depth"]
        ),
        optim=OptimConfig(name="adamw", weight_decay=0.1, head_weight_decay=0.1, warmup_steps=100),
        data=DataConfig(train="synthetic", validation="synthetic", crop="inception"),
        mesh=MeshConfig(data=-1),
    )
