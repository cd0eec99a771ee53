"""ViT-B/16 on ImageNet-1k alone, by DeiT III's recipe, in 400 or 800 epochs.

Source: Touvron, Cord & Jegou 2022, "DeiT III: Revenge of the ViT" (arXiv 2204.07118), section 3; for 800 epochs the
    commands in README_revenge.md of github.com/facebookresearch/deit; for 400 the weight decay and stochastic depth of
    a reproduction in JAX, github.com/affjljoo3581/deit3-jax.
Command: python launch/tpu.py --config recipes/vit_b16_i1k.py:800
    For images in folders: --config.data.train=folder:/data/imagenet --config.data.validation=folder:/data/imagenet
    (`train` and `val` in it). Set --config.data.workers where 'wait' in the log is not near 0.
Hardware and hours: the source used 8 GPUs of one machine, hours not found. The reproduction reports 4 h 42 min for 400
    epochs and 9 h 28 min for 800, at 192 px, on a TPU v4-64.
Expected: the source reports 83.8 % top-1 after 800 epochs (83.5 after 400, as the reproduction quotes it), trained at
    192 px and then for 20 epochs at 224 px. Without LAMB, repeated augmentation and that second phase: not known.
Not run.

Differences from the source:
    224 px throughout, not 192 px and then fine-tuning at 224 px, as a run cannot start from another one's weights.
    AdamW for LAMB at 3e-3. Its learning rate, 8e-4, is the 1e-4 x batch / 256 with which He et al. 2022 trained ViT-B
        and -L from scratch (MAE, appendix; recalled, not checked). The weight decay is the source's. Neither was tuned.
    No repeated augmentation: the source's batch holds three views each of a third as many images.
    Mixed labels stay fractions, where the source sets both classes of a mixture to 1; and each pair draws its own
        ratio, where the source's batch shares one.
    The loss is summed over classes, not averaged. AdamW's updates do not feel that, clipping at 1.0 does: here it acts
        at nearly every step.
    Stochastic depth rises linearly to its rate, which the source gives to every layer. The head starts at zero, and
        position embeddings with a deviation of 1 / sqrt(width), not 0.02.
"""

from vit22b.config import DataConfig, LossConfig, MeshConfig, OptimConfig, Recipe, RunConfig
from vit22b.errors import check_choice
from vit22b.model_config import SIZES, ModelConfig, size

TRAIN_IMAGES = 1_281_167  # ImageNet-1k's training set
BATCH_SIZE = 2048
STOCHASTIC_DEPTH = {"400": 0.1, "800": 0.2}
WEIGHT_DECAY = {"400": 0.02, "800": 0.05}


def get_config(arg: str = "800") -> Recipe:
    check_choice("epochs", arg, tuple(WEIGHT_DECAY))
    steps_per_epoch = TRAIN_IMAGES / BATCH_SIZE
    return Recipe(
        name=f"vit_b16_i1k_{arg}ep",
        total_steps=round(int(arg) * steps_per_epoch),
        batch_size=BATCH_SIZE,
        model=ModelConfig(
            **size("B", SIZES),
            num_classes=1000,
            patch_size=16,
            block="sequential",
            norm="layer",
            norm_bias=True,
            qk_norm="none",
            qkv_bias=True,
            proj_bias=True,
            mlp="gelu",
            layer_scale=1e-4,  # models_v2.py of the source's code, `init_scale`
            class_token=True,
            pool="cls",
            stochastic_depth=STOCHASTIC_DEPTH[arg],
            init="truncated_normal",
        ),
        loss=LossConfig(kind="sigmoid"),
        optim=OptimConfig(
            name="adamw",
            learning_rate=8e-4,
            schedule="cosine",
            warmup_steps=round(5 * steps_per_epoch),
            final_fraction=0.01,
            weight_decay=WEIGHT_DECAY[arg],
            head_weight_decay=WEIGHT_DECAY[arg],
            clip_norm=1.0,
        ),
        data=DataConfig(
            train="tfds:imagenet2012:train",
            validation="tfds:imagenet2012:validation",
            crop="inception",
            min_area=0.08,
            eval_crop_fraction=1.0,
            augment="three_augment",
            color_jitter=0.3,
            mixup=0.8,
            cutmix=1.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        mesh=MeshConfig(replica=-1, data=1),  # small enough for a copy on every device
        run=RunConfig(log_every_steps=50, eval_every_steps=5_000, checkpoint_every_steps=2_500),
    )
