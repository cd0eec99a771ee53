"""The 22B architecture in small on CIFAR-10: real images on which a change of numerics or schedule shows in minutes.

`cifar10.py:SIZE` takes a rung of the ladder from 0.5M to 100M. 32 px in patches of 4: 64 tokens.

Source: none; the schedule is a common one for small ViTs.
Command: python launch/tpu.py --config recipes/cifar10.py:30M
    From one .npz file: --config.data.train=npz:cifar10.npz:train --config.data.validation=npz:cifar10.npz:test
Measured: 30M, top-1 after 2,000 steps 56.6 and 55.5 % (seeds 0 and 1) on an H200, on JPEGs of quality 75; with
    --config.model.matmul=fp8 56.5 and 56.1 %. The other sizes: not run.
"""

from vit22b.config import DataConfig, LossConfig, OptimConfig, Recipe, RunConfig
from vit22b.errors import check_choice
from vit22b.model_config import LADDER, ModelConfig, size

SIZES = ("0.5M", "3M", "10M", "30M", "100M")


def get_config(arg: str = "30M") -> Recipe:
    check_choice("size", arg, SIZES)
    shape = size(arg, LADDER)
    return Recipe(
        name=f"cifar10_{arg}",
        total_steps=2_000,
        batch_size=256,
        # No loop over the layers: on a GPU its short kernels would be started one by one.
        model=ModelConfig(**shape, num_classes=10, image_size=32, patch_size=4, scan_unroll=shape["depth"]),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200, beta2=0.99, weight_decay=0.1, head_weight_decay=0.1),
        data=DataConfig(
            train="tfds:cifar10:train", validation="tfds:cifar10:test", crop="shift", eval_crop_fraction=1.0, threads=1
        ),
        run=RunConfig(log_every_steps=20, eval_every_steps=500, checkpoint_every_steps=2_000),
    )
