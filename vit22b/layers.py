"""The layers of a Vision Transformer, on an Explicit mesh.

Letters, here and in model.py: B batch, T tokens, D width, F MLP width, N heads, H head dim, K a
kernel's outputs. Arrays carry them: `x_BTD`. Parameters are fp32; `DTYPES[config.matmul]` is what
matmuls read and write; norms and softmax compute in fp32.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh, reshard

from vit22b import fp8, init
from vit22b.activations import ACTIVATIONS, STEEPEST
from vit22b.hardware import is_hopper, runs_triton
from vit22b.kernels import activations, attention, norms
from vit22b.kernels.tiles import fits
from vit22b.linear import KERNEL_IN, column_parallel, gathered, kernel_out, read_as, row_parallel
from vit22b.model_config import ModelConfig
from vit22b.sharding import COLUMN, HEADS, HIDDEN, ROW, SPLIT


def new_kernel(key: jax.Array, shape: tuple[int, int], spec: P, config: ModelConfig) -> nnx.Param:
    """A matrix of the body, initialised as the recipe says (mimetic initialization concerns self-attention alone)."""
    create = init.truncated_normal if config.init == "truncated_normal" else init.xavier
    return nnx.Param(create(key, shape, spec))


def vector(size: int, value: float = 0.0) -> nnx.Param:
    """A replicated fp32 vector: norm scale, bias or LayerScale."""
    return nnx.Param(jnp.full((size,), value, jnp.float32))


def wants_kernels(config: ModelConfig) -> bool:
    """Whether Pallas kernels compute norms, activations and their rounding to fp8, of arrays that they fit."""
    return config.kernels == "pallas" or (config.kernels == "auto" and runs_triton(jax.devices()[0]))


class Norm(nnx.Module):
    """RMSNorm (ViT-22B's un-centred LayerNorm) or LayerNorm over the last dimension, in fp32.

    Takes and returns (..., size) in any dtype and sharding.
    """

    def __init__(self, size: int, config: ModelConfig):
        self.scale = vector(size, 1.0)
        self.bias = vector(size) if config.norm_bias else None
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        config, scale, bias = self.config, *self._vectors()
        centred = config.norm == "layer"
        if self._kernels_apply(x):
            spec = jax.typeof(x).sharding.spec
            norm = functools.partial(norms.norm, centred=centred, epsilon=config.norm_epsilon)
            return jax.shard_map(norm, in_specs=(spec, P(), P()), out_specs=spec, check_vma=False)(x, scale, bias)
        y = x.astype(jnp.float32)
        if centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon) * scale
        return (y if bias is None else y + bias).astype(x.dtype)

    def branch_off(self, x: jax.Array, count: int, spec: P) -> tuple[jax.Array, list[jax.Array]]:
        """The residual stream x, and its norm as `spec` for each of `count` readers, whose gradients meet here."""
        if not self._kernels_apply(x):
            return x, [reshard(self(x), spec)] * count
        own, config = jax.typeof(x).sharding.spec, self.config
        # With several devices on 'model' readers' gradients are added before they come here; else `spec` and `own` mean
        # the same.
        alone = get_abstract_mesh().shape["model"] == 1
        slot_specs = [spec] * count if alone else [own]
        branch_off = functools.partial(
            norms.branch_off, centred=config.norm == "layer", epsilon=config.norm_epsilon, count=len(slot_specs)
        )
        run = jax.shard_map(branch_off, in_specs=(own, P(), P()), out_specs=(own, own, slot_specs), check_vma=False)
        x, y, slots = run(x, *self._vectors())
        if alone:
            y = reshard(y, spec)
            return x, [norms.take(y, slot) for slot in slots]
        return x, [reshard(norms.take(y, *slots), spec)] * count

    def length(self) -> jax.Array:
        """What no row of the norm exceeds in length, fp32: without scale and bias it is the root of its size."""
        scale, bias = self._vectors()
        length = math.sqrt(scale.shape[0]) * jnp.max(jnp.abs(scale))
        return (length if bias is None else length + jnp.linalg.norm(bias)) * (1 + 2.0**-8)  # rounded to bf16

    def _vectors(self) -> tuple[jax.Array, jax.Array | None]:
        return self.scale[...], None if self.bias is None else self.bias[...]

    def _kernels_apply(self, x: jax.Array) -> bool:
        whole_rows = jax.typeof(x).sharding.shard_shape(x.shape)[-1] == x.shape[-1]
        return wants_kernels(self.config) and fits(x) and whole_rows and x.shape[-1] <= norms.MAX_WIDTH


class Branch(nnx.Module):
    """What attention and MLP share, seen from a block: kernels in, something in between, a kernel out.

    The matmuls themselves are `Sublayer`'s, which does those of several branches together.
    """

    region: str  # name of its scope, by which profiles are read
    out: nnx.Param  # (K, D)
    out_bias: nnx.Param | None
    scale: nnx.Param | None  # LayerScale [Touvron 2021, section 2]

    @property
    def inputs(self) -> list[nnx.Param]:
        """The (D, K) kernels."""
        raise NotImplementedError

    def hidden(self, ys: list[jax.Array], rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """From products with `inputs`, (B, T, K) each, without biases, to what `out` projects back, (B, T, K)."""
        raise NotImplementedError

    @property
    def fits_fp8(self) -> bool:
        """Whether `in_fp8` computes this branch."""
        return False

    def in_fp8(self, x_BTD: jax.Array, length: jax.Array) -> jax.Array:
        """The whole branch without the output's bias, for fp8 matmuls: (B, T, D) of rows no longer than `length`."""
        raise NotImplementedError

    def scaled(self, w: nnx.Param) -> jax.Array:
        """A kernel or bias of the output with LayerScale folded in."""
        if self.scale is None:
            return w[...]
        # Of the kernel's type where its gradient is summed over replicas later; see linear.sum_replicas_later.
        return w[...] * reshard(self.scale[...], P(reduced=jax.typeof(w[...]).sharding.spec.reduced))


class Attention(Branch):
    """Multi-head self-attention, optionally with query-key normalization [Dehghani 2023, section 2]."""

    region = "attention"

    def __init__(self, config: ModelConfig, key: jax.Array, qk_norm: str, layer_scale: float):
        width, specs = config.width, (KERNEL_IN, KERNEL_IN, KERNEL_IN, kernel_out(config.width, config))
        if config.init == "mimetic":
            key_qk, key_vo = jax.random.split(key)
            weights = [*init.mimetic_query_key(key_qk, width, config.num_heads), *init.mimetic_value_out(key_vo, width)]
            params = [nnx.Param(reshard(w, spec)) for w, spec in zip(weights, specs, strict=True)]
        else:
            keys = jax.random.split(key, 4)
            params = [new_kernel(k, (width, width), spec, config) for k, spec in zip(keys, specs, strict=True)]
        self.query, self.key, self.value, self.out = params
        self.query_bias, self.key_bias, self.value_bias = (vector(width) if config.qkv_bias else None for _ in range(3))
        self.out_bias = vector(width) if config.proj_bias else None
        self.scale = vector(width, layer_scale) if layer_scale else None
        if qk_norm != "none":
            size = config.head_dim if qk_norm == "head" else width
            self.query_norm, self.key_norm = Norm(size, config), Norm(size, config)
        self.qk_norm = qk_norm
        self.num_heads = config.num_heads
        self.implementation = config.attention

    @property
    def inputs(self) -> list[nnx.Param]:
        return [self.query, self.key, self.value]

    def hidden(self, ys: list[jax.Array], rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        q, k, v = map(add_bias, ys, (self.query_bias, self.key_bias, self.value_bias))
        if self.qk_norm == "width":
            q, k = self.query_norm(q), self.key_norm(k)
        q_BTNH, k_BTNH, v_BTNH = (self._split_heads(x) for x in (q, k, v))
        if self.qk_norm == "head" and rope is None and norms_in_attention(q_BTNH, self.query_norm, self.implementation):
            y_BTNH = normed_attention(q_BTNH, k_BTNH, v_BTNH, self.query_norm, self.key_norm)
        else:
            if self.qk_norm == "head":
                q_BTNH, k_BTNH = self.query_norm(q_BTNH), self.key_norm(k_BTNH)
            if rope is not None:
                q_BTNH, k_BTNH = rotate(q_BTNH, *rope), rotate(k_BTNH, *rope)
            y_BTNH = dot_product_attention(q_BTNH, k_BTNH, v_BTNH, self.implementation)
        return checkpoint_name(jax.lax.reshape(y_BTNH, q.shape, out_sharding=HIDDEN), "attention")

    def _split_heads(self, x_BTK: jax.Array) -> jax.Array:
        b, t, k = x_BTK.shape
        return jax.lax.reshape(x_BTK, (b, t, self.num_heads, k // self.num_heads), out_sharding=HEADS)


def dot_product_attention(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, implementation: str) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v per head, softmax in fp32; heads and batch stay where they are.

    `implementation`: 'xla'; 'cudnn' (fused; bf16, H a multiple of 8, even lengths); 'pallas' (kernels/attention.py;
    Hopper, bf16, some H and up to 256 tokens); 'auto': the last of these that applies. Attention pooling's single query
    goes to XLA, whatever is asked for.
    """
    chosen = chosen_attention(q_BTNH, implementation)
    attend: Callable = (
        attention.attention
        if chosen == "pallas"
        else functools.partial(jax.nn.dot_product_attention, implementation=chosen)
    )
    # cuDNN's custom partitioning does not know Explicit axes; within shard_map there is nothing to partition.
    return jax.shard_map(attend, in_specs=(HEADS,) * 3, out_specs=HEADS, check_vma=False)(q_BTNH, k_BSNH, v_BSNH)


def normed_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, query_norm: Norm, key_norm: Norm
) -> jax.Array:
    """The same of normalised queries and keys in one kernel, where `norms_in_attention`."""
    attend = functools.partial(attention.normed_attention, epsilon=query_norm.config.norm_epsilon)
    run = jax.shard_map(attend, in_specs=(HEADS, HEADS, HEADS, P(), P()), out_specs=HEADS, check_vma=False)
    return run(q_BTNH, k_BTNH, v_BTNH, query_norm.scale[...], key_norm.scale[...])


def norms_in_attention(q_BTNH: jax.Array, norm: Norm, implementation: str) -> bool:
    """Whether the kernel that computes attention can apply this norm to queries and keys, too."""
    fits_norms = norm.config.norm == "rms" and norm.bias is None and attention.fits_norms(q_BTNH.shape)
    return fits_norms and wants_kernels(norm.config) and chosen_attention(q_BTNH, implementation) == "pallas"


def chosen_attention(q_BTNH: jax.Array, implementation: str) -> str:
    """What `dot_product_attention` uses."""
    if q_BTNH.shape[1] == 1:
        return "xla"
    return fastest_attention(q_BTNH) if implementation == "auto" else implementation


def fastest_attention(q_BTNH: jax.Array) -> str:
    """The implementation for queries, keys and values of one shape on the devices here."""
    _, length, _, head_dim = q_BTNH.shape
    shape = jax.typeof(q_BTNH).sharding.shard_shape(q_BTNH.shape)
    if is_hopper(jax.devices()[0]) and attention.fits(shape, q_BTNH.dtype):
        return "pallas"
    # cuDNN under JAX 0.11 cannot differentiate odd lengths.
    fits_cudnn = q_BTNH.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0
    return "cudnn" if fits_cudnn and jax.default_backend() == "gpu" else "xla"


def rotate(x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Rotary position embedding in the rotate-half form, in fp32."""
    x = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    y = x * cos_TH[:, None, :] + turned * sin_TH[:, None, :]
    return y.astype(x_BTNH.dtype)


def rope_angles(grid: tuple[int, int], num_prefix: int, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin, (T, H) fp32, of 2-D axial rotations.

    A quarter of the head's dims turns with the row and a quarter with the column, with periods base^(2j / (H/2)).
    Patch centres lie in [-1, 1] along each axis [Simeoni 2025, DINOv3, section 3.2]; or, with `config.rope_grid`, a
    patch's index counts in radians, scaled to that grid [Fang 2023, EVA-02]. Prefix tokens are not turned.
    """
    head_dim, native = config.head_dim, config.rope_grid
    periods = config.rope_base ** (2 * jnp.arange(head_dim // 4, dtype=jnp.float32) / (head_dim / 2))
    if native:
        rows, columns = (jnp.arange(n, dtype=jnp.float32) * (native / n) for n in grid)
    else:
        rows, columns = (2 * math.pi * (2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1) for n in grid)
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = places[:, :, None] / periods
    angles = jnp.tile(angles.reshape(-1, head_dim // 2), (1, 2))
    angles = jnp.pad(angles, ((num_prefix, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


class MLP(Branch):
    """A dense layer, GELU, a dense layer; or SwiGLU [Shazeer 2020]."""

    region = "mlp"

    def __init__(self, config: ModelConfig, key: jax.Array, layer_scale: float):
        gate_key, up_key, out_key = jax.random.split(key, 3)
        width, hidden, gated = config.width, config.mlp_dim, config.mlp == "swiglu"
        self.gate = new_kernel(gate_key, (width, hidden), KERNEL_IN, config) if gated else None
        self.up = new_kernel(up_key, (width, hidden), KERNEL_IN, config)
        self.out = new_kernel(out_key, (hidden, width), kernel_out(hidden, config), config)
        self.gate_bias = vector(hidden) if gated and config.mlp_bias else None
        self.up_bias = vector(hidden) if config.mlp_bias else None
        self.out_bias = vector(width) if config.mlp_bias else None
        self.sub_norm = Norm(hidden, config) if config.mlp_sub_norm else None
        self.scale = vector(width, layer_scale) if layer_scale else None
        self.config = config

    @property
    def inputs(self) -> list[nnx.Param]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    def hidden(self, ys: list[jax.Array], rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        if self.gate is None:
            y = self._activate(ys[0], self.up_bias)
        else:
            y = self._activate(ys[0], self.gate_bias) * add_bias(ys[1], self.up_bias)
        return y if self.sub_norm is None else self.sub_norm(y)

    def _activate(self, x_BTF: jax.Array, bias: nnx.Param | None) -> jax.Array:
        """The activation of x + bias."""
        name = self.config.mlp
        if wants_kernels(self.config) and fits(x_BTF) and name in activations.SLOPES:
            activate = functools.partial(activations.activate, name=name)
            run = jax.shard_map(activate, in_specs=(HIDDEN, SPLIT), out_specs=HIDDEN, check_vma=False)
            return run(x_BTF, hidden_bias(bias, x_BTF.shape[-1]))
        # Only its input is kept for the backward pass, not the several values that its derivative is made of.
        return jax.checkpoint(lambda x: ACTIVATIONS[name](add_bias(x, bias)))(x_BTF)

    @property
    def fits_fp8(self) -> bool:
        return self.gate is None and self.sub_norm is None and self.config.mlp in STEEPEST

    def in_fp8(self, x_BTD: jax.Array, length: jax.Array) -> jax.Array:
        bias, pallas = hidden_bias(self.up_bias, self.up.shape[-1]), wants_kernels(self.config)
        return fp8.mlp(x_BTD, length, self.up[...], bias, self.scaled(self.out), self.config.mlp, pallas)


class Sublayer(NamedTuple):
    """Branches that read one norm of the residual stream (B, T, D) and add to it.

    In stages, between which other work can go on: `kernels` communicates over 'data', `read` and `add` over 'model'.
    """

    norm: Norm
    branches: list[Branch]
    config: ModelConfig
    rope: tuple[jax.Array, jax.Array] | None = None
    keep_B11: jax.Array | None = None  # multiplies what is added: stochastic depth

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD, normed = self.read(x_BTD)
        return self.add(x_BTD, self.compute(normed, self.kernels()))

    def kernels(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Those that branches read and write with, as `linear.gathered` gives them; not of branches that fp8 fuses."""
        inward = [w[...] for branch in self._others for w in branch.inputs]
        outward = [branch.scaled(branch.out) for branch in self._others]
        return gathered(inward, COLUMN, self.config), gathered(outward, ROW, self.config)

    def read(self, x_BTD: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The stream, and its norm as kernels read it: one for each, or for all."""
        # Where all kernels read one array together, it has one reader.
        others = sum(len(branch.inputs) for branch in self._others)
        together = min(others, 1) if self._narrow or self.config.overlap != "none" else others
        with jax.named_scope("norm"):
            return self.norm.branch_off(x_BTD, together + len(self._fused), read_as(self.config))

    def compute(self, normed: list[jax.Array], kernels: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        """What the branches add, but for biases: (B, T, D), perhaps each device's part of a sum; see `linear.PARTS`."""
        config, pallas, outputs = self.config, wants_kernels(self.config), []
        together = len(normed) - len(self._fused)
        with jax.named_scope("norm"):
            length = self.norm.length()  # unused, and not computed, but for fp8
        if self._others:
            regions = [branch.region for branch in self._others for _ in branch.inputs]
            ys = column_parallel(normed[:together], kernels[0], regions, config, length, pallas)
            hidden = []
            for branch in self._others:
                count = len(branch.inputs)
                with jax.named_scope(branch.region):
                    hidden.append(branch.hidden(ys[:count], self.rope))
                ys = ys[count:]
            regions = [branch.region for branch in self._others]
            outputs.append(row_parallel(hidden, kernels[1], regions, config, pallas))
        for branch, read_BTD in zip(self._fused, normed[together:], strict=True):
            with jax.named_scope(branch.region):
                outputs.append(branch.in_fp8(read_BTD, length))
        return functools.reduce(jnp.add, outputs)

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """The stream with what `compute` gave added to it."""
        y_BTD = reshard(y_BTD, jax.typeof(x_BTD).sharding.spec)
        for branch in self.branches:
            if branch.out_bias is not None:
                with jax.named_scope(branch.region):
                    y_BTD = y_BTD + branch.scaled(branch.out_bias).astype(y_BTD.dtype)
        x_BTD = x_BTD + (y_BTD if self.keep_B11 is None else y_BTD * self.keep_B11)
        if jax.default_backend() != "gpu":
            return x_BTD
        # Left to itself XLA for GPUs lays the stream out with the batch last; every norm and matmul transposes it.
        return with_layout_constraint(x_BTD, Layout((0, 1, 2)))

    @property
    def _narrow(self) -> bool:
        return self.config.matmul == "fp8"

    @property
    def _fused(self) -> list[Branch]:
        return [branch for branch in self.branches if self._narrow and branch.fits_fp8]

    @property
    def _others(self) -> list[Branch]:
        return [branch for branch in self.branches if not (self._narrow and branch.fits_fp8)]


def hidden_bias(bias: nnx.Param | None, size: int) -> jax.Array:
    """A bias along the hidden dimension as kernels take it: split as that is, zeros for None."""
    return jnp.zeros(size, out_sharding=SPLIT) if bias is None else reshard(bias[...], SPLIT)


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """y plus a bias over its last dim, in y's dtype; None adds nothing."""
    return y if bias is None else y + bias[...].astype(y.dtype)
