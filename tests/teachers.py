"""Tiny trained teachers, and a recipe of a student of theirs; shared by the tests of distillation."""

import dataclasses
from pathlib import Path

from distill.config import DistillConfig, DistillRecipe
from launch.tpu import run
from vit22b.config import DataConfig, OptimConfig, Recipe, RunConfig
from vit22b.model_config import ModelConfig

MODEL = ModelConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=10, image_size=8, patch_size=4, matmul="fp32"
)
DATA = DataConfig(train="digits", validation="digits", crop="shift", eval_crop_fraction=1.0, threads=1)


def train_teachers(folder: Path) -> list[str]:
    """Two, by work directory: plain; wider, with a class token, other means and finer patches."""
    names = []
    finer = dataclasses.replace(MODEL, width=48, patch_size=2, class_token=True, pool="cls")
    for name, model, mean in (("plain", MODEL, 0.5), ("fine", finer, 0.3)):
        config = Recipe(
            name=name, total_steps=3, batch_size=16, model=model, data=dataclasses.replace(DATA, mean=(mean,) * 3),
            optim=OptimConfig(learning_rate=1e-2, schedule="constant"), run=RunConfig(log_every_steps=3),
        )  # fmt: skip
        assert run(config, folder / name) == 0
        names.append(str(folder / name))
    return names


def recipe(teachers: list[str], *, mixup: float = 1.0, **changes) -> DistillRecipe:
    fields = {"teaching": "function_matching" if mixup else "consistent", "matmul": "fp32"}
    return DistillRecipe(
        name="student",
        total_steps=4,
        batch_size=16,
        model=dataclasses.replace(MODEL, width=16, num_heads=2, stochastic_depth=0.2),
        data=dataclasses.replace(DATA, mixup=mixup),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, ema_decay=0.9),
        run=RunConfig(log_every_steps=1, eval_every_steps=2, checkpoint_every_steps=2),
        distill=DistillConfig(teachers=tuple(teachers), **fields | changes),
    )
