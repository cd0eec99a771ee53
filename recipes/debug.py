"""Every mechanism at width 64: six small runs on handwritten digits, which together take every choice there is.

Not for accuracy: a change that breaks a mechanism should break one of these runs. `debug.py:NAME` takes 'parallel'
(the default; ViT-22B's block, with all it can be combined with), 'sequential' (DeiT III's), 'gated', 'plain', 'eva02'
or 'features' (what public teachers have beside that).

Source: none.
Command: XLA_FLAGS=--xla_force_host_platform_device_count=8 python launch/tpu.py --config recipes/debug.py
    Without XLA_FLAGS it runs on the devices there are; add --config.mesh.model=2 for tensor parallelism.
Measured: 15 to 33 s each, with 8 simulated devices on 2 CPU cores that other work shared. The last training losses,
    in the order above: 2.17, 3.15, 2.18, 1.49, 0.90, 0.87; guessing has 2.30, and with the sigmoid loss of 'sequential'
    3.25.
"""

from typing import Any

from vit22b.config import DataConfig, LossConfig, MeshConfig, OptimConfig, Recipe, RunConfig
from vit22b.errors import check_choice
from vit22b.model_config import ModelConfig

STEPS = 60
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "parallel": {
        "model": {
            "position": "rope",
            "class_token": True,
            "num_registers": 2,
            "layer_scale": 0.5,
            "stochastic_depth": 0.1,
            "init": "mimetic",
            "overlap": "rings",
            "remat": "full",
        },
        "loss": {"label_smoothing": 0.1, "z_loss": 1e-4},
        "optim": {
            "name": "adafactor",
            "schedule": "rsqrt",
            "cooldown_steps": 20,
            "timescale_steps": 20,
            "momentum_dtype": "bf16",
            "accumulate_steps": 2,
            "ema_decay": 0.9,
        },
        "data": {
            "crop": "shift",
            "flip": False,
            "augment": "randaugment",
            "randaugment_layers": 1,
            "randaugment_magnitude": 3,
            "random_erasing": 0.1,
        },
    },
    "sequential": {
        "model": {
            "block": "sequential",
            "norm": "layer",
            "norm_bias": True,
            "qk_norm": "width",
            "qkv_bias": True,
            "proj_bias": True,
            "mlp": "gelu",
            "layer_scale": 0.5,
            "class_token": True,
            "pool": "cls",
            "stochastic_depth": 0.1,
            "head_bias": -2.0,
            "matmul": "fp32",
            "attention": "xla",
            "kernels": "xla",
            "remat": "dots",
        },
        "loss": {"kind": "sigmoid"},
        "optim": {"schedule": "cosine", "final_fraction": 0.1},
        "data": {
            "crop": "inception",
            "min_area": 0.8,
            "augment": "three_augment",
            "mixup": 0.1,
            "cutmix": 0.1,
            "workers": 1,
        },
    },
    "gated": {
        "model": {
            "init": "truncated_normal",
            "mlp": "swiglu",
            "mlp_bias": False,
            "qk_norm": "none",
            "position": "sincos",
            "pool": "gap",
            "kernels": "pallas",
            "remat": "attention",
            "scan_unroll": 2,
        },
        "optim": {"name": "muon", "schedule": "wsd", "cooldown_steps": 20},
        "data": {"crop": "resize"},
    },
    "plain": {
        "model": {"position": "none", "qk_norm": "none", "matmul": "fp8"},
        "optim": {"schedule": "constant", "weight_decay": 0.0, "head_weight_decay": 0.0, "clip_norm": 0.0},
        "data": {"crop": "resize", "flip": False},
    },
    "eva02": {
        "model": {
            "block": "sequential",
            "norm": "layer",
            "qk_norm": "none",
            "mlp": "swiglu",
            "mlp_sub_norm": True,
            "position": "learned_rope",
            "position_resampling": "cubic_plain",
            "rope_base": 10_000.0,
            "rope_grid": 4,
            "class_token": True,
            "pool": "gap",
            "final_norm": "pooled",
        },
        "optim": {},
        "data": {"crop": "resize"},
    },
    "features": {
        "model": {
            "block": "sequential",
            "position_resampling": "linear",
            "class_token": True,
            "pool": "cls_gap",
            "final_norm": "none",
            "overlap": "halves",
        },
        "optim": {},
        "data": {"crop": "resize", "train_images": 1_000, "eval_resize": "square"},
    },
}


def get_config(arg: str = "parallel") -> Recipe:
    check_choice("variant", arg, tuple(VARIANTS))
    changes = VARIANTS[arg]
    model = {"width": 64, "depth": 2, "mlp_dim": 256, "num_heads": 2, "image_size": 8, "patch_size": 2}
    optim = {"learning_rate": 5e-3, "warmup_steps": 10, "weight_decay": 0.1, "head_weight_decay": 0.1, "beta2": 0.99}
    return Recipe(
        name=f"debug_{arg}",
        total_steps=STEPS,
        batch_size=64,
        model=ModelConfig(**{**model, "num_classes": 10, **changes["model"]}),
        loss=LossConfig(**changes.get("loss", {})),
        optim=OptimConfig(**{**optim, **changes["optim"]}),
        data=DataConfig(
            **{"train": "digits", "validation": "digits", "eval_crop_fraction": 1.0, "threads": 1, **changes["data"]}
        ),
        mesh=MeshConfig(data=-1),
        run=RunConfig(log_every_steps=20, eval_every_steps=30, checkpoint_every_steps=30),
    )
