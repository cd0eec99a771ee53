"""ViT-22B, or the same architecture at any size of `vit22b.model_config.LADDER`, from 0.5M parameters up.

THE DEFAULT DATA ARE RANDOM IMAGES, with which nothing is learned: the source's JFT-4B is not public. As it stands this
recipe measures speed and memory; --config.data.crop=resize --config.data.flip=false spare the host the augmentation.

Source: Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442), sections 2 to 4
    and Table 1. Steps, batch, learning rate, warm-up, cooldown and weight decays are recalled, not checked against the
    text. The optimizer, its clipping and the schedule's timescale are not known; they are those of the same authors'
    ViT-g (recipes/vit_g14.py), as is the number of classes.
Command: python launch/tpu.py --config recipes/vit22b.py:22B
    On several hosts, on each of them, with a --workdir that all of them see. Any other rung: vit22b.py:300M and so on.
    With images of your own, in folders train/CLASS and val/CLASS of /data/mine, add --config.model.num_classes=1000
    --config.data.train=folder:/data/mine --config.data.validation=folder:/data/mine (vit22b/sources.py has the other
    forms). For a set of a million images also lower --config.batch_size and --config.total_steps.
Hardware and hours: the source used 1,024 TPU v4 chips at 1,150 tokens per second and chip (recalled, not checked): the
    177,000 steps are 3.0e12 tokens, hence 29 days. This recipe's mesh there is 16 (replica) x 16 (data) x 4 (model).
Expected: the source reports 89.5 % top-1 on ImageNet-1k of a linear probe on the frozen 22B. With random images: a loss
    that stays near that of guessing, 11.3.
Measured: only for speed, some 20 steps on random images with JAX 0.11.2 and bf16. 1B at batch 256 on one H200: 298
    images/s, 48.8 % MFU; at batch 512 on two: 603 images/s by FSDP, 547 tensor parallel. No rung has been trained.
    Compiled, not run, for 1,024 TPU v4 chips by launch/plan.py: 20.3 GiB a chip; 14.0 s a step by XLA's estimates.

Differences from the source: the data; one label per image, where JFT has several. Smaller rungs are not in the source:
    their batch sizes, with its steps and learning rate, are our choice and untuned. From 1B on all activations are
    computed again in the backward pass. Whether the attention's output projection has a bias is not known; here it has
    none. Warm-up starts at 1/10,000 of the peak, not at 0.
"""

from vit22b.config import DataConfig, LossConfig, MeshConfig, OptimConfig, Recipe, RunConfig
from vit22b.model_config import LADDER, ModelConfig, size

BATCH_SIZES = {
    **dict.fromkeys(("0.5M", "3M", "10M", "30M"), 1024),
    **dict.fromkeys(("100M", "300M", "1B"), 4096),
    **dict.fromkeys(("2B", "4B", "8B", "12B"), 16_384),
    "22B": 65_536,
}
REMATERIALISED = ("1B", "2B", "4B", "8B", "12B", "22B")


def get_config(arg: str = "22B") -> Recipe:
    shape = size(arg, LADDER)
    return Recipe(
        name=f"vit22b_{arg}",
        total_steps=177_000,
        batch_size=BATCH_SIZES[arg],
        model=ModelConfig(  # the architecture is ModelConfig's default
            **shape,
            num_classes=29_593,  # JFT-3B's
            head_bias=-10.0,
            remat="full" if arg in REMATERIALISED else "none",
            overlap="rings" if arg == "22B" else "none",  # the source's asynchronous parallel linear operations
        ),
        loss=LossConfig(kind="sigmoid"),
        optim=OptimConfig(
            name="adafactor",
            learning_rate=1e-3,
            schedule="rsqrt",
            warmup_steps=10_000,
            timescale_steps=10_000,
            cooldown_steps=30_000,
            weight_decay=0.03,
            head_weight_decay=3.0,
            momentum_dtype="bf16",
            clip_norm=1.0,
        ),
        data=DataConfig(train="synthetic", validation="synthetic", crop="inception"),
        # By plan.py on 1,024 TPU v4 chips. Rings want short axes: 16 x 4 chips hold the parameters, 16 times over.
        mesh=MeshConfig(replica=-1, data=16, model=4) if arg == "22B" else MeshConfig(),
        run=RunConfig(log_every_steps=50, eval_every_steps=5_000, checkpoint_every_steps=1_000),
    )
