"""What a run is: typed recipes, and every check of them that needs no device.

A recipe file returns a `Recipe` from `get_config()`. All defaults live here, those of the model in model_config.py, and
nowhere else. The dataclasses are plain (not frozen) because `ml_collections.config_flags` sets overridden fields in
place; `Recipe.validate()` runs after the overrides and before anything else.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit22b.errors import check, check_choice
from vit22b.model_config import ModelConfig

if TYPE_CHECKING:
    from vit22b.objective import Objective


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
    kind: str = "softmax"  # 'softmax'; 'sigmoid': multi-label, summed over classes
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of log(Z)^2 [Chowdhery 2022]; softmax only

    def validate(self) -> None:
        check_choice("loss.kind", self.kind, ("softmax", "sigmoid"))
        check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must be in [0, 1)")
        check(self.z_loss >= 0, "loss.z_loss", self.z_loss, "must be 0 (off) or positive")
        check(self.z_loss == 0 or self.kind == "softmax", "loss.z_loss", self.z_loss, "needs loss.kind='softmax'")


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
    """One update rule: clip, precondition, decay, scale by the schedule.

    Weight decay is AdamW's: at every step the weight shrinks by `learning rate x decay`.
    """

    name: str = "adamw"  # 'adamw', 'adafactor' (big_vision's form), 'muon' (AdamW for non-matrices)
    learning_rate: float = 1e-3  # the schedule's peak
    schedule: str = "cosine"  # 'cosine', 'rsqrt', 'wsd' (constant, then cooldown), 'constant'
    warmup_steps: int = 0  # linear, from 0
    cooldown_steps: int = 0  # linear, to final_fraction; rsqrt and wsd
    timescale_steps: int = 10_000  # rsqrt: lr ~ 1/sqrt(1 + (step - warmup)/timescale)
    final_fraction: float = 0.0  # cosine and cooldown end at this part of their start
    weight_decay: float = 0.0  # matrices of the body; norms, biases, tokens, positions get none
    head_weight_decay: float = 0.0  # the classifier's matrix
    beta1: float = 0.9  # also Adafactor's and Muon's momentum
    beta2: float = 0.999  # Adafactor: cap of its growing decay 1 - t^-0.8
    epsilon: float = 1e-8  # AdamW's; Adafactor's is 1e-30
    momentum_dtype: str = "fp32"  # 'fp32', 'bf16'
    clip_norm: float = 1.0  # global gradient norm; 0: off
    accumulate_steps: int = 1  # microbatches per update
    ema_decay: float = 0.0  # exponential moving average of the weights, used for evaluation; 0: off

    def validate(self, total_steps: int) -> None:
        check_choice("optim.name", self.name, ("adamw", "adafactor", "muon"))
        check_choice("optim.schedule", self.schedule, ("cosine", "rsqrt", "wsd", "constant"))
        check_choice("optim.momentum_dtype", self.momentum_dtype, ("fp32", "bf16"))
        for name in (
            "learning_rate",
            "warmup_steps",
            "cooldown_steps",
            "weight_decay",
            "head_weight_decay",
            "clip_norm",
            "epsilon",
        ):
            check(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative")
        check(0 <= self.final_fraction <= 1, "optim.final_fraction", self.final_fraction, "must be in [0, 1]")
        check(self.timescale_steps >= 1, "optim.timescale_steps", self.timescale_steps, "must be at least 1")
        check(self.accumulate_steps >= 1, "optim.accumulate_steps", self.accumulate_steps, "must be at least 1")
        for name in ("beta1", "beta2", "ema_decay"):
            check(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must be in [0, 1)")
        check(
            self.cooldown_steps == 0 or self.schedule in ("rsqrt", "wsd"),
            "optim.cooldown_steps",
            self.cooldown_steps,
            f"has no effect with optim.schedule={self.schedule!r}; use rsqrt or wsd",
        )
        ramps = self.warmup_steps + self.cooldown_steps
        check(
            ramps <= total_steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"with optim.cooldown_steps={self.cooldown_steps} exceeds total_steps={total_steps}; "
            f"give at most {total_steps} in all",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """A source is 'digits', 'synthetic', 'npz:PATH', 'folder:PATH' or 'tfds:NAME', each with an optional ':SPLIT'."""

    train: str
    validation: str
    train_images: int = 0  # so many of the training set, the same for every seed; 0: all
    crop: str = "inception"  # 'inception' [Szegedy 2015]; 'resize'; 'shift': pad by 1/8, crop at random
    min_area: float = 0.05  # inception crop: smallest part of the image's area
    eval_crop_fraction: float = 0.875  # evaluation resizes to image_size / this, then crops the centre
    eval_resize: str = "short_side"  # to which that applies, keeping the aspect; 'square': to both sides
    flip: bool = True
    augment: str = "none"  # 'none', 'randaugment' [Cubuk 2020], 'three_augment' [Touvron 2022]
    randaugment_layers: int = 2
    randaugment_magnitude: int = 10  # of 30; what timm calls 9 of 10 is 27
    color_jitter: float = 0.3  # three_augment's brightness, contrast, saturation
    random_erasing: float = 0.0  # probability [Zhong 2020]
    mixup: float = 0.0  # Beta(a, a) [Zhang 2018]; with cutmix too, each batch draws one of the two
    cutmix: float = 0.0  # Beta(a, a) [Yun 2019]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    workers: int = 0  # decoding processes; 0: threads of this one
    threads: int = 8  # decoding threads per process; for images of 64 pixels and less 1 is faster
    prefetch_batches: int = 2

    def validate(self) -> None:
        check_choice("data.crop", self.crop, ("inception", "resize", "shift"))
        check_choice("data.eval_resize", self.eval_resize, ("short_side", "square"))
        check_choice("data.augment", self.augment, ("none", "randaugment", "three_augment"))
        check(0 < self.min_area <= 1, "data.min_area", self.min_area, "must be in (0, 1]")
        check(
            0.1 <= self.eval_crop_fraction <= 1,
            "data.eval_crop_fraction",
            self.eval_crop_fraction,
            "must be in [0.1, 1]",
        )
        check(0 <= self.random_erasing <= 1, "data.random_erasing", self.random_erasing, "must be in [0, 1]")
        check(
            0 <= self.randaugment_magnitude <= 30,
            "data.randaugment_magnitude",
            self.randaugment_magnitude,
            "must be in 0..30",
        )
        for name in ("mixup", "cutmix", "color_jitter", "workers", "train_images"):
            check(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must be 0 (off) or positive")
        for name in ("randaugment_layers", "threads", "prefetch_batches"):
            check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            check(
                len(values) == 3 and all(isinstance(v, int | float) for v in values),
                f"data.{name}",
                values,
                "needs three numbers, for R, G, B, as '(0.5,0.5,0.5)'",
            )
        check(min(self.std) > 0, "data.std", self.std, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """An array of a training batch: images as augmentation makes them, or as evaluation does."""

    name: str
    size: int  # pixels a side
    eval_crop: float = 0.0  # as evaluation, with this `DataConfig.eval_crop_fraction`; 0: as augmentation
    eval_resize: str = "short_side"  # as evaluation, as `DataConfig.eval_resize`
    stream: int = 0  # views of one stream are cropped and augmented alike


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices per mesh axis; -1 for at most one of them: all that remain."""

    replica: int = 1  # batch; parameters replicated (data parallelism)
    data: int = -1  # batch; parameters sharded (FSDP)
    model: int = 1  # width of activations and parameters (tensor parallelism)


@dataclasses.dataclass(kw_only=True, slots=True)
class RunConfig:
    log_every_steps: int = 50
    eval_every_steps: int = 1_000
    checkpoint_every_steps: int = 1_000
    keep_checkpoints: int = 2

    def validate(self) -> None:
        for field in dataclasses.fields(self):
            check(getattr(self, field.name) >= 1, f"run.{field.name}", getattr(self, field.name), "must be at least 1")


@dataclasses.dataclass(kw_only=True, slots=True)
class Recipe:
    name: str
    total_steps: int
    batch_size: int
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def validate(self) -> None:
        """Raises `RecipeError` for the first field, or pair of fields, that cannot work on any machine."""
        check(self.total_steps >= 1, "total_steps", self.total_steps, "must be at least 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0..4294967295")
        check(self.total_steps < 2**31, "total_steps", self.total_steps, "must be below 2147483648")
        ok = bool(self.name) and "/" not in self.name and self.name not in (".", "..")
        check(ok, "name", repr(self.name), "must be a plain name: it is the work directory's in runs/")
        for field, value in self.flat().items():
            numbers = value if isinstance(value, list) else [value]
            finite = all(math.isfinite(n) for n in numbers if isinstance(n, float))
            check(finite, field, value, "must be finite")
        self.model.validate()
        self.data.validate()
        self.loss.validate()
        self.optim.validate(self.total_steps)
        self.run.validate()
        n = self.optim.accumulate_steps
        check(
            self.batch_size % n == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of optim.accumulate_steps={n}; try {math.ceil(self.batch_size / n) * n}",
        )

    def objective(self) -> "Objective":
        """What the run trains, and on which loss."""
        from vit22b.objective import Supervised  # imports JAX, which a recipe can be read without

        return Supervised(self)

    def check_mesh(self, data: int, model: int) -> None:
        """Raises `RecipeError` where these counts of devices on 'data' and 'model' do not divide what is trained."""
        self.model.check_mesh(data, model)

    def period(self) -> int | None:
        """After how many steps the training stream begins anew, if it does."""
        return None

    def views(self) -> "tuple[View, ...]":
        """What the input pipeline makes of each image."""
        return (View(name="image", size=self.model.image_size),)

    def flat(self) -> dict[str, object]:
        """Every field by its dotted name, as in `--config.NAME`."""
        return flatten(dataclasses.asdict(self))


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{'model': {'depth': 4}} -> {'model.depth': 4}; tuples become lists, as JSON reads them back."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat(flat: Mapping[str, object]) -> Recipe:
    """The recipe whose `flat()`, or what JSON has made of it, this is. Names that are no field's are passed over."""

    def build(kind: type, prefix: str) -> Any:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            name = prefix + field.name
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                values[field.name] = build(field.type, name + ".")
            elif name in flat:
                value = flat[name]
                values[field.name] = tuple(value) if isinstance(value, list) else value
        return kind(**values)

    return build(Recipe, "")
