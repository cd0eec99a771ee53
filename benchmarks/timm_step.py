"""Times timm's equivalent of a recipe with PyTorch: the peer of `launch/bench.py --vs timm`, on one device.

    python benchmarks/timm_step.py --config recipes/bench.py:L16 [--steps N] [--mode MODE] [--device cuda|cpu]

Prints one line of JSON. Needs torch, timm, numpy, ml-collections and absl-py, not JAX. The same job as the recipe's
train step, as a careful user of timm would write it: torch.compile, bf16 autocast over fp32 parameters, TF32 for what
stays in fp32, fused AdamW, gradients clipped, uint8 images normalised on the device. --mode is torch.compile's
(default: 'default'), or 'none' to run uncompiled; --steps as in launch/bench.py.

Differences from the recipe's model: attention pooling has biases here; one flag gives timm's attention and MLP output
projections their biases together, so both have one where the recipe has either. The learning rate is constant.
A field that has no equivalent is refused in one line, with exit status 2.
"""

import argparse
import datetime
import functools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from launch.command_line import flag_parser, parse
    from vit22b.config import Recipe
    from vit22b.errors import RecipeError, check, check_choice
    from vit22b.flops import train_flops
    from vit22b.hardware import CHIPS, GIB
    from vit22b.model_config import ModelConfig
    from vit22b.timing import check_steps, spread, time_groups, warm_up
except ModuleNotFoundError as missing:
    sys.exit(f"error: no module {missing.name}: pip install torch timm numpy ml-collections absl-py")

POOLS = {"gap": "avg", "cls": "token", "map": "map"}
POSITIONS = {"learned": "learn", "none": "none"}


def refuse(recipe: Recipe) -> None:
    """Raises `RecipeError` naming the first field that timm and this script have no equivalent for."""
    supported: dict[str, tuple[object, ...]] = {
        "model.mlp": ("gelu", "gelu_tanh"),
        "model.mlp_bias": (True,),
        "model.position": tuple(POSITIONS),
        "model.qk_norm": ("none", "head"),
        "model.remat": ("none", "full"),
        "loss.z_loss": (0.0,),
        "optim.name": ("adamw",),
        "optim.momentum_dtype": ("fp32",),
        "optim.accumulate_steps": (1,),
        "optim.ema_decay": (0.0,),
        "data.mixup": (0.0,),
        "data.cutmix": (0.0,),
    }
    fields = recipe.flat()
    for field, values in supported.items():
        choices = " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
        check(
            fields[field] in values, field, fields[field], f"has no equivalent in timm's benchmark; it knows {choices}"
        )
    check(recipe.model.matmul != "fp32", "model.matmul", "fp32", "timm's benchmark computes in bf16")


def model_arguments(config: ModelConfig) -> dict[str, object]:
    """Arguments of timm's VisionTransformer, without the classes that take PyTorch to name."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "global_pool": POOLS[config.pool],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": (config.mlp_dim + 0.5) / config.width,  # timm rounds width x ratio down, to mlp_dim
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm == "head",
        "proj_bias": config.proj_bias or config.mlp_bias,
        "init_values": config.layer_scale or None,
        "class_token": config.class_token,
        "reg_tokens": config.num_registers,
        "pos_embed": POSITIONS[config.position],
        "no_embed_class": True,  # positions are of patches alone
        "fc_norm": False,  # normalised before pooling
        "drop_path_rate": config.stochastic_depth,
        "act_layer": config.mlp,  # the names are the same
    }


def build(config: ModelConfig, device: str) -> Any:
    """timm's model with fp32 parameters on the device, in training mode."""
    import torch
    from timm.layers import RmsNorm
    from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer

    norm = functools.partial(torch.nn.LayerNorm, bias=config.norm_bias) if config.norm == "layer" else RmsNorm
    with torch.device(device):
        model = VisionTransformer(
            **model_arguments(config),
            norm_layer=functools.partial(norm, eps=config.norm_epsilon),
            block_fn=ParallelScalingBlock if config.block == "parallel" else Block,
        )
    model.set_grad_checkpointing(config.remat == "full")
    return model.train()


def make_optimizer(recipe: Recipe, model: Any) -> Any:
    """Fused AdamW with the recipe's decay: of matrices and of the head's, not of vectors, tokens and positions."""
    import torch

    groups: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("token", "pos_embed", "latent"))
        decay = recipe.optim.head_weight_decay if name == "head.weight" else recipe.optim.weight_decay
        groups.setdefault(decay if matrix else 0.0, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=recipe.optim.learning_rate,
        betas=(recipe.optim.beta1, recipe.optim.beta2),
        eps=recipe.optim.epsilon,
        fused=True,
    )


class Step:
    """Called, it queues one train step; `loss` is the last one's. The batch is random and lies on the device."""

    def __init__(self, recipe: Recipe, device: str, mode: str) -> None:
        import torch

        self._recipe, self._device = recipe, device
        self.model = build(recipe.model, device)
        self._optimizer = make_optimizer(recipe, self.model)
        self._compiled = self.model if mode == "none" else torch.compile(self.model, mode=mode)
        size, batch = recipe.model.image_size, recipe.batch_size
        self._images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        self._labels = torch.randint(0, recipe.model.num_classes, (batch,), device=device)
        values = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
        self._mean, self._std = values
        self.loss: Any = None

    def _loss(self, logits: Any) -> Any:
        from torch.nn import functional

        config, labels = self._recipe.loss, self._labels
        if config.kind == "softmax":
            return functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        count = logits.shape[1]
        targets = functional.one_hot(labels, count) * (1 - config.label_smoothing) + config.label_smoothing / count
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(labels)

    def __call__(self) -> None:
        import torch

        images = (self._images.float() / 255 - self._mean) / self._std
        with torch.autocast(self._device, dtype=torch.bfloat16):
            logits = self._compiled(images)
        self.loss = self._loss(logits.float())
        self._optimizer.zero_grad(set_to_none=True)
        self.loss.backward()
        if self._recipe.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.optim.clip_norm)
        self._optimizer.step()


def measure(recipe: Recipe, device: str, mode: str, steps: int) -> dict[str, object]:
    """Figures under the names of `launch/bench.py`, which explains them; 'peak_gib' is the allocator's, on GPUs."""
    import timm
    import torch

    torch.set_float32_matmul_precision("high")
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    step = Step(recipe, device, mode)
    start = time.perf_counter()
    step()
    wait()
    compile_s = time.perf_counter() - start  # with one step's own time
    warm_up(step, wait)
    timed = spread(time_groups(step, wait, steps))
    step_s = timed["step_ms"] / 1e3
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    chip = CHIPS.get(kind)
    flops = train_flops(recipe.model) * recipe.batch_size
    return {
        "recipe": recipe.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timm": timm.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device_kind": kind,
        "batch_size": recipe.batch_size,
        "mode": mode,
        "steps": steps,
        "params_m": sum(parameter.numel() for parameter in step.model.parameters()) / 1e6,
        "compile_s": compile_s,
        **timed,
        "images_per_second": recipe.batch_size / step_s,
        "mfu": None if chip is None else flops / step_s / chip.peak_flops,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "loss": step.loss.item(),
    }


def check_torch(device: str) -> None:
    """Raises `RecipeError` where PyTorch or timm is missing, or PyTorch has not exactly the one device to time."""
    try:
        import timm  # noqa: F401
        import torch
    except ModuleNotFoundError as missing:
        packages = "pip install torch timm numpy ml-collections absl-py"
        raise RecipeError(f"{sys.executable} has no {missing.name}: {packages}") from missing
    if device == "cuda":
        count = torch.cuda.device_count()
        remedy = "give it one, by CUDA_VISIBLE_DEVICES=0; JAX_PLATFORMS=cpu compares on the CPU"
        check(count == 1, "--device", device, f"PyTorch {torch.__version__} sees {count} GPUs; {remedy}")


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="default", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    try:
        arguments, rest = parser.parse_known_args()
        check_choice("--device", arguments.device, ("cuda", "cpu"))
        modes = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        check_choice("--mode", arguments.mode, modes)
        check_steps(arguments.steps)
        recipe, _ = parse([sys.argv[0], *rest])
        recipe.validate()
        refuse(recipe)
        check_torch(arguments.device)
        print(json.dumps(measure(recipe, arguments.device, arguments.mode, arguments.steps)))
        return 0
    except (RecipeError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
