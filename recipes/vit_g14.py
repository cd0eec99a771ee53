"""ViT-g/14 (1 B parameters) or ViT-G/14 (1.8 B) on a large labelled set, as in "Scaling Vision Transformers".

THE DEFAULT DATA ARE RANDOM IMAGES, with which nothing is learned: the source's JFT-3B is not public. As it stands this
recipe measures speed and memory; --config.data.crop=resize --config.data.flip=false spare the host the augmentation.

Source: Zhai, Kolesnikov, Houlsby & Beyer 2022, "Scaling Vision Transformers" (arXiv 2106.04560), and its configuration
    big_vision/configs/proj/scaling_laws/train_vit_g.py.
Command: python launch/tpu.py --config recipes/vit_g14.py:g
    With images of your own, in folders train/CLASS and val/CLASS of /data/mine, add --config.model.num_classes=1000
    --config.data.train=folder:/data/mine --config.data.validation=folder:/data/mine (vit22b/sources.py has the other
    forms). For a set of a million images also lower --config.batch_size and --config.total_steps.
Hardware and hours: the source says 32 images of g/14 fit a TPU v3 core, so that its batch needs 512 of them; hours not
    found.
Expected: of G/14 the paper reports 84.86 % on ImageNet-1k with 10 images a class, and 90.45 % after fine-tuning. Of
    g/14 no figure was found. With random images: a loss that stays near that of guessing, 11.3.
Not run.

Differences from the source: the data; one label per image, where JFT has several. All activations are computed again in
    the backward pass. Adafactor factors the attention's kernels as matrices, the source's as (width, heads, head dim).
    Warm-up starts at 1/10,000 of the peak, not at 0.
"""

from vit22b.config import DataConfig, LossConfig, MeshConfig, OptimConfig, Recipe, RunConfig
from vit22b.errors import check_choice
from vit22b.model_config import SIZES, ModelConfig, size


def get_config(arg: str = "g") -> Recipe:
    check_choice("size", arg, ("g", "G"))
    return Recipe(
        name=f"vit_{arg}14",
        total_steps=1_000_000,
        batch_size=16_384,
        model=ModelConfig(
            **size(arg, SIZES),
            num_classes=29_593,  # JFT-3B's
            patch_size=14,
            block="sequential",
            norm="layer",
            norm_bias=True,
            qk_norm="none",
            qkv_bias=True,
            proj_bias=True,
            pool="map",
            head_bias=-10.0,
            remat="full",
        ),
        loss=LossConfig(kind="sigmoid"),
        optim=OptimConfig(
            name="adafactor",
            learning_rate=8e-4,
            schedule="rsqrt",
            warmup_steps=10_000,
            timescale_steps=10_000,
            cooldown_steps=50_000,
            weight_decay=0.03,
            head_weight_decay=3.0,
            momentum_dtype="bf16",
            clip_norm=1.0,
        ),
        data=DataConfig(train="synthetic", validation="synthetic", crop="inception"),
        mesh=MeshConfig(data=-1),
        run=RunConfig(log_every_steps=50, eval_every_steps=10_000, checkpoint_every_steps=1_000),
    )
