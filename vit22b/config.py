"""What a run is: typed recipes, the table of sizes, and every check that needs no device.

A recipe file returns a `Recipe` from `get_config()`. All defaults live here and nowhere else. The
dataclasses are plain (not frozen) because `ml_collections.config_flags` sets overridden fields in
place; `Recipe.validate()` runs after the overrides and before anything else.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from vit22b.objective import Objective


class RecipeError(ValueError):
    """A mistake of the user's, told in one line: the field, the value got, what would work."""


def check(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raises `RecipeError('FIELD=VALUE: REMEDY')` unless `ok`."""
    if not ok:
        raise RecipeError(f"{field}={value}: {remedy}")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `RecipeError` listing the choices unless `value` is one of them."""
    check(value in choices, field, repr(value), "choose one of " + ", ".join(choices))


# (width, depth, MLP width, heads). Sources: Ti..L, H: [Dosovitskiy 2021] Table 1 and [Touvron 2021];
# So400m: [Alabdulmohsin 2023]; g, G: [Zhai 2022] Table 2; e: [Chen 2022, PaLI] Table 1;
# 22B: [Dehghani 2023, arXiv 2302.05442] Table 1.
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
    "22B": (6144, 48, 24576, 48),
}

# The 22B architecture scaled down: MLP = 4 x width, head dim 128 from 100M on (32 or 64 below, so
# that at least two heads remain for tensor parallelism). Named by parameters without the classifier.
LADDER = {
    "0.5M": (64, 8, 256, 2),
    "3M": (128, 12, 512, 4),
    "10M": (256, 12, 1024, 4),
    "30M": (384, 16, 1536, 6),
    "100M": (768, 14, 3072, 6),
    "300M": (1024, 24, 4096, 8),
    "1B": (1536, 36, 6144, 12),
    "2B": (2048, 40, 8192, 16),
    "4B": (3072, 36, 12288, 24),
    "8B": (4096, 40, 16384, 32),
    "12B": (5120, 38, 20480, 40),
    "22B": SIZES["22B"],
}


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # a model carries it as static data
class ModelConfig:
    """A Vision Transformer. The defaults are ViT-22B's architecture [Dehghani 2023, section 2]."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_classes: int
    image_size: int = 224
    patch_size: int = 14

    block: str = "parallel"  # 'parallel': x + Attn(norm x) + MLP(norm x); 'sequential': pre-norm
    norm: str = "rms"  # 'rms': un-centred, as in ViT-22B; 'layer': centred
    norm_bias: bool = False
    norm_epsilon: float = 1e-6
    qk_norm: str = "head"  # 'none'; 'head': over each head's dims; 'width': before the head split
    qkv_bias: bool = False
    proj_bias: bool = False  # attention output projection
    mlp: str = "gelu_tanh"  # 'gelu' (erf), 'gelu_tanh', 'swiglu' (mlp_dim is its hidden width)
    mlp_bias: bool = True
    mlp_sub_norm: bool = False  # a norm of the MLP's hidden layer before it is projected back [Fang 2023, EVA-02]
    layer_scale: float = 0.0  # initial value of LayerScale [Touvron 2021]; 0: absent
    position: str = "learned"  # 'learned', 'sincos', 'rope' (2-D axial), 'learned_rope' (both), 'none'
    # Learned positions on another grid: 'cubic', antialiased; 'cubic_plain': as PyTorch does by default, not
    # antialiased and steeper (-0.75); 'linear', antialiased.
    position_resampling: str = "cubic"
    rope_base: float = 100.0
    # 0: rotations by patch centres in [-1, 1] (DINOv3). N: by patch indices, as if rows and columns were N (EVA-02).
    rope_grid: int = 0
    class_token: bool = False
    num_registers: int = 0  # [Darcet 2024]
    # 'map': attention pooling [Zhai 2022]; 'gap': mean of patches; 'cls'; 'cls_gap': both, one behind the other
    pool: str = "map"
    final_norm: str = "tokens"  # 'tokens': before pooling; 'pooled': after it; 'none'
    stochastic_depth: float = 0.0  # drop rate of the last layer, rising linearly from 0

    init: str = "xavier"  # 'xavier' (as in big_vision), 'truncated_normal' (0.02), 'mimetic'
    head_bias: float = 0.0  # initial classifier bias; -10 with sigmoid over many classes

    # How it is computed. These change speed and memory, and rounding at most.
    # 'bf16', 'fp32', or 'fp8': bf16, but 8-bit floats in the blocks' linear layers, which rounds much more; see
    # vit22b/fp8.py. Parameters, norms, softmax, logits are always fp32.
    matmul: str = "bf16"
    # Communication over 'data' and 'model' in rings beside the matmuls, or as XLA arranges it; see vit22b/ring.py.
    overlap: bool = False
    attention: str = "auto"  # 'xla', 'cudnn', 'pallas'; 'auto': the last of these that applies
    kernels: str = "auto"  # of norms and activations: 'pallas' (vit22b/kernels), 'xla', 'auto': pallas on a GPU
    remat: str = "none"  # recomputed in the backward pass: 'none', 'full', 'dots', 'attention'; see model.REMAT
    scan_unroll: int = 1  # layers per iteration of the scan; >= depth: no loop at all

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def unrolled(self) -> bool:
        """Whether layers follow one another in the program, without a loop."""
        return self.scan_unroll >= self.depth

    @property
    def num_tokens(self) -> int:
        """Sequence length in the blocks: patches, class token, registers."""
        return self.grid**2 + self.class_token + self.num_registers

    @property
    def pooled_width(self) -> int:
        """Inputs of the classifier."""
        return 2 * self.width if self.pool == "cls_gap" else self.width

    @property
    def learns_positions(self) -> bool:
        return self.position in ("learned", "learned_rope")

    @property
    def rotates(self) -> bool:
        """Whether queries and keys turn with their patch's place."""
        return self.position in ("rope", "learned_rope")

    def validate(self) -> None:
        for name in (
            "width",
            "depth",
            "mlp_dim",
            "num_heads",
            "num_classes",
            "image_size",
            "patch_size",
            "scan_unroll",
        ):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        check(self.num_registers >= 0, "model.num_registers", self.num_registers, "must be 0 or more")
        check(self.norm_epsilon > 0, "model.norm_epsilon", self.norm_epsilon, "must be positive")
        check(self.rope_base > 0, "model.rope_base", self.rope_base, "must be positive")
        check(self.rope_grid >= 0, "model.rope_grid", self.rope_grid, "must be 0 (patch centres) or a grid's side")
        check(self.layer_scale >= 0, "model.layer_scale", self.layer_scale, "must be 0 (off) or positive")
        check(0 <= self.stochastic_depth < 1, "model.stochastic_depth", self.stochastic_depth, "must be in [0, 1)")
        check_choice("model.block", self.block, ("parallel", "sequential"))
        check_choice("model.norm", self.norm, ("rms", "layer"))
        check_choice("model.qk_norm", self.qk_norm, ("none", "head", "width"))
        check_choice("model.mlp", self.mlp, ("gelu", "gelu_tanh", "swiglu"))
        check_choice("model.position", self.position, ("learned", "sincos", "rope", "learned_rope", "none"))
        check_choice("model.position_resampling", self.position_resampling, ("cubic", "cubic_plain", "linear"))
        check_choice("model.pool", self.pool, ("map", "gap", "cls", "cls_gap"))
        check_choice("model.final_norm", self.final_norm, ("tokens", "pooled", "none"))
        check_choice("model.init", self.init, ("xavier", "truncated_normal", "mimetic"))
        check_choice("model.remat", self.remat, ("none", "full", "dots", "attention"))
        check_choice("model.matmul", self.matmul, ("bf16", "fp32", "fp8"))
        check_choice("model.attention", self.attention, ("auto", "xla", "cudnn", "pallas"))
        check_choice("model.kernels", self.kernels, ("auto", "xla", "pallas"))
        check(
            self.width % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide model.width={self.width}; nearest: {nearest_divisors(self.width, self.num_heads)}",
        )
        p, s = self.patch_size, self.image_size
        around = " or ".join(str(n * p) for n in (s // p, s // p + 1) if n)
        check(s % p == 0, "model.image_size", s, f"must be a multiple of model.patch_size={p}; try {around}")
        if self.position == "sincos" or self.rotates:
            dim, what = (self.width, "width") if self.position == "sincos" else (self.head_dim, "head dim")
            check(dim % 4 == 0, "model.position", repr(self.position), f"needs a {what} divisible by 4, not {dim}")
        check(
            self.class_token or self.pool not in ("cls", "cls_gap"),
            "model.pool",
            repr(self.pool),
            "needs --config.model.class_token=true",
        )
        check(
            self.final_norm != "pooled" or self.pool in ("gap", "cls"),
            "model.final_norm",
            "'pooled'",
            f"needs model.pool='gap' or 'cls', not {self.pool!r}",
        )
        # The types of weights in rings are too new for JAX 0.10 to cut them up into several layers per iteration.
        check(
            not self.overlap or self.scan_unroll == 1 or self.scan_unroll >= self.depth,
            "model.scan_unroll",
            self.scan_unroll,
            f"with model.overlap=true must be 1, or model.depth={self.depth} and more",
        )
        check(
            not self.overlap or self.remat != "dots",
            "model.remat",
            "'dots'",
            "saves nothing of matmuls in rings (model.overlap=true); choose one of none, full, attention",
        )
        check(
            self.matmul != "fp32" or self.attention not in ("cudnn", "pallas"),
            "model.attention",
            f"'{self.attention}'",
            "needs model.matmul='bf16' or 'fp8'",
        )
        check(
            self.matmul != "fp32" or self.kernels != "pallas",
            "model.kernels",
            "'pallas'",
            "needs model.matmul='bf16' or 'fp8'",
        )
        check(
            self.matmul != "fp8" or not self.overlap,
            "model.overlap",
            "true",
            "not with model.matmul='fp8'; use model.overlap=false or model.matmul='bf16'",
        )


def nearest_divisors(number: int, value: int) -> str:
    """The divisors of `number` next below and next above `value`, as text."""
    below = next(n for n in range(min(value, number), 0, -1) if number % n == 0)
    above = next((n for n in range(value, min(number, 2 * value) + 1) if number % n == 0), below)
    return ", ".join(str(n) for n in sorted({below, above}))


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
    eval_crop_fraction: float = 0.875  # evaluation resizes the short side to image_size / this, then crops the centre
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
    """An array of a training batch: images as augmentation makes them, or, if `plain`, as evaluation does."""

    name: str
    size: int  # pixels a side
    plain: bool = False
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


class Size(TypedDict):
    """The four fields of `ModelConfig` that a size sets."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


def size(name: str, table: dict[str, tuple[int, int, int, int]]) -> Size:
    """A row of `SIZES` or `LADDER` as arguments of `ModelConfig`; raises `RecipeError` naming the sizes there are."""
    check_choice("size", name, tuple(table))
    width, depth, mlp_dim, num_heads = table[name]
    return Size(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
