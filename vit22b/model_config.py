"""The model part of a recipe: every field of a Vision Transformer with its default, and the tables of sizes."""

import dataclasses
from typing import TypedDict

from vit22b.errors import check, check_choice


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
    # Communication beside matmuls: 'none' but what XLA arranges; 'rings' over 'data' and 'model' (vit22b/ring.py), for
    # TPUs; 'halves' of the batch in turns, over 'model' (vit22b/halves.py), for GPUs.
    overlap: str = "none"
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
        check_choice("model.overlap", self.overlap, ("none", "rings", "halves"))
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
            self.overlap != "rings" or self.scan_unroll == 1 or self.scan_unroll >= self.depth,
            "model.scan_unroll",
            self.scan_unroll,
            f"with model.overlap='rings' must be 1, or model.depth={self.depth} and more",
        )
        check(
            self.overlap != "rings" or self.remat != "dots",
            "model.remat",
            "'dots'",
            "saves nothing of matmuls in rings (model.overlap='rings'); choose one of none, full, attention",
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
            self.matmul != "fp8" or self.overlap == "none",
            "model.overlap",
            repr(self.overlap),
            "not with model.matmul='fp8'; use model.overlap=none or model.matmul='bf16'",
        )

    def check_mesh(self, data: int, model: int) -> None:
        """Raises `RecipeError` where these counts of devices on 'data' and 'model' do not divide the model."""
        for axis, count, fields in (("data", data, ("width",)), ("model", model, ("width", "num_heads", "mlp_dim"))):
            sizes = {field: getattr(self, field) for field in fields}
            fitting = [n for n in range(1, count + 1) if not any(size % n for size in (count, *sizes.values()))]
            for field, value in sizes.items():
                check(
                    value % count == 0,
                    f"mesh.{axis}",
                    count,
                    f"must divide model.{field}={value}; the largest that does: {fitting[-1]}",
                )


def nearest_divisors(number: int, value: int) -> str:
    """The divisors of `number` next below and next above `value`, as text."""
    below = next(n for n in range(min(value, number), 0, -1) if number % n == 0)
    above = next((n for n in range(value, min(number, 2 * value) + 1) if number % n == 0), below)
    return ", ".join(str(n) for n in sorted({below, above}))


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

ALL_SIZES = SIZES | LADDER


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


def resized(config: ModelConfig, name: str) -> ModelConfig:
    """The architecture at another of `ALL_SIZES`, its layers in a loop or not as before; raises `RecipeError`."""
    row = size(name, ALL_SIZES)
    return dataclasses.replace(config, **row, scan_unroll=row["depth"] if config.unrolled else config.scan_unroll)
