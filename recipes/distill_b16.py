"""ViT-B/16 at 384 px learns ImageNet-1k's classes from a frozen teacher, patiently: ViT-22B's distillation.

Source: Dehghani et al. 2023 (arXiv 2302.05442), section 4.6: students at 384 px, KL divergence, 1,000 epochs, 500
    stored views per image; and Beyer et al. 2022 (arXiv 2106.05237) for function matching: the same crop, flip and
    mixup for both, temperature 1. ViT-22B's weights are not public: `teachers` is whatever launch/convert.py or a run
    of one's own has left in a work directory, with ImageNet-1k's 1,000 classes.
Command: python launch/tpu.py --config recipes/distill_b16.py --config.distill.teachers="('runs/teacher',)"
    From a cache of 500 views per image, written once:
    python launch/teach.py --config recipes/distill_b16.py --config.distill.teachers="('runs/teacher',)"
    --config.distill.cache=/data/views --config.distill.cached_steps=156393
    and then the first command with the same flags.
Expected: the source reports 88.6 % top-1 from ViT-22B, its student pretrained on JFT. From public teachers: not known.
Not run.

Differences from the source: the student starts from scratch. Learning rate and decay are FlexiViT's order of magnitude
    (AdamW, decay 0.1, clipped at 1.0), scaled to a batch of 4,096, and were not tuned.
"""

import dataclasses

from distill.config import DistillConfig, DistillRecipe
from recipes import vit_b16_i1k
from vit22b.config import DataConfig, OptimConfig, RunConfig
from vit22b.model_config import ModelConfig

TRAIN_IMAGES = vit_b16_i1k.TRAIN_IMAGES
BATCH_SIZE = 4096
EPOCHS = 1000


def get_config() -> DistillRecipe:
    model = dataclasses.replace(vit_b16_i1k.get_config().model, image_size=384, stochastic_depth=0.0)
    return student("distill_b16", model)


def from_features(name: str, teacher: str, width: int) -> DistillRecipe:
    """The same student at 256 px, of a teacher that has no classifier and features of so many dims."""
    base = get_config()
    return dataclasses.replace(
        base,
        name=name,
        model=dataclasses.replace(base.model, image_size=256, num_registers=4),
        # At the student's size, so that their patches are the same.
        distill=DistillConfig(
            teachers=(teacher,), image_sizes=(256,), match="features", widths=(width,), teaching="consistent"
        ),
        data=dataclasses.replace(base.data, mixup=0.0),
    )


def student(name: str, model: ModelConfig) -> DistillRecipe:
    """The recipe with another student."""
    return DistillRecipe(
        name=name,
        total_steps=round(EPOCHS * TRAIN_IMAGES / BATCH_SIZE),
        batch_size=BATCH_SIZE,
        model=model,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5_000, weight_decay=0.1, head_weight_decay=0.1),
        data=DataConfig(
            train="tfds:imagenet2012:train", validation="tfds:imagenet2012:validation", crop="inception", mixup=1.0
        ),
        distill=DistillConfig(teachers=("runs/teacher",)),
        run=RunConfig(log_every_steps=50, eval_every_steps=5_000, checkpoint_every_steps=2_500),
    )
