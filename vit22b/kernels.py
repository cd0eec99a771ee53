"""GPU kernels for what lies between matmuls: norms, and an activation with its bias.

XLA's own kernels for the backward passes of these read their operands twice, are slow where a row is not a power of
two (head dims 72 and 88), and keep intermediate values of the activation. These (Pallas, in its Triton form) read each
value once, compute everything else anew in registers, and sum the gradients of vectors on the way. BENCHMARKS.md has
what they save. Elsewhere than on GPUs they are interpreted, slowly, for tests; layers.py decides where they are used.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NORM_VALUES = 4_096  # values of a norm's tile: 32 a thread
NORM_TILES = 8  # tiles that a program of the backward pass goes through, summing for scale and bias in registers
MAX_WIDTH = 8_192  # of a norm's row
ACTIVATION_TILE = (8, 256)  # rows, columns
ACTIVATION_TILES = 16


def fits(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the kernels apply to an array of one device: bf16, loads of 16 bytes, and places that int32 can count."""
    return dtype == jnp.bfloat16 and shape[-1] % 8 == 0 and 0 < math.prod(shape) < 2**31


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, centred: bool, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last dim, of arrays on one device.

    `x`: (..., W) bf16 with W at most MAX_WIDTH; `scale`, `bias`: (W,) fp32. Not `centred`: the mean counts as 0.
    Returns bf16; statistics and products are fp32. Only the arguments are kept for the backward pass.
    """
    return _norm_forward(x, scale, bias, centred, epsilon)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def activation(x: jax.Array, bias: jax.Array, name: str) -> jax.Array:
    """The activation `name` of x + bias, of arrays on one device; computed in fp32.

    `x`: (..., F) bf16; `bias`: (F,) fp32; `name`: a key of SLOPES. Returns bf16. Only the arguments are kept.
    """
    return _activation_forward(x, bias, name)[0]


# Norms. A program holds some whole rows, padded to a power of two.


def _tile(index: Any, width: int, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row numbers (rows, 1) and column numbers (1, padded width) of a norm's tile, and the mask of those that exist."""
    rows = _norm_rows(width)
    numbers, columns = index * rows + jnp.arange(rows)[:, None], jnp.arange(pl.next_power_of_2(width))[None, :]
    return numbers, columns, (numbers < num_rows) & (columns < width)


def _norm_programs(shape: tuple[int, ...], tiles: int) -> int:
    num_rows, width = shape
    return pl.cdiv(num_rows, _norm_rows(width) * tiles)


def _norm_rows(width: int) -> int:
    """Rows of a norm's tile."""
    return max(1, NORM_VALUES // pl.next_power_of_2(width))


def _load(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[rows, columns], mask=mask, other=0.0).astype(jnp.float32)


def _load_vector(ref: Any, columns: jax.Array) -> jax.Array:
    return triton.load(ref.at[columns], mask=columns < ref.shape[0], other=0.0)


def _normed(x: jax.Array, width: int, mask: jax.Array, centred: bool, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Rows before scale and bias, zero beyond the width, and 1 / their standard deviation, (rows, 1)."""
    if centred:
        x = jnp.where(mask, x - jnp.sum(x, axis=1, keepdims=True) / width, 0.0)
    inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / width + epsilon)
    return x * inverse, inverse


def _norm_forward_kernel(x_ref, scale_ref, *refs, centred: bool, epsilon: float):
    *bias_ref, out_ref = refs
    num_rows, width = x_ref.shape
    numbers, columns, mask = _tile(pl.program_id(0), width, num_rows)
    y = _normed(_load(x_ref, numbers, columns, mask), width, mask, centred, epsilon)[0]
    y = y * _load_vector(scale_ref, columns)
    if bias_ref:
        y = y + _load_vector(bias_ref[0], columns)
    triton.store(out_ref.at[numbers, columns], y.astype(out_ref.dtype), mask=mask)


def _norm_backward_kernel(x_ref, grad_ref, scale_ref, grad_x_ref, *sum_refs, centred: bool, epsilon: float):
    """`sum_refs`: a row per program of sums for the gradients of scale and, where there is one, bias."""
    num_rows, width = x_ref.shape
    program = pl.program_id(0)
    _, vector, tile_mask = _tile(0, width, num_rows)
    scale = _load_vector(scale_ref, vector)

    def add(index, sums):
        numbers, columns, mask = _tile(program * NORM_TILES + index, width, num_rows)
        normed, inverse = _normed(_load(x_ref, numbers, columns, mask), width, mask, centred, epsilon)
        grad = _load(grad_ref, numbers, columns, mask)
        sums = [total + part for total, part in zip(sums, (grad * normed, grad), strict=False)]
        grad = grad * scale
        out = grad - normed * (jnp.sum(grad * normed, axis=1, keepdims=True) / width)
        if centred:
            out = out - jnp.sum(grad, axis=1, keepdims=True) / width
        triton.store(grad_x_ref.at[numbers, columns], (out * inverse).astype(grad_x_ref.dtype), mask=mask)
        return sums

    sums = jax.lax.fori_loop(0, NORM_TILES, add, [jnp.zeros(tile_mask.shape, jnp.float32) for _ in sum_refs])
    for ref, total in zip(sum_refs, sums, strict=True):
        triton.store(ref.at[program, vector], jnp.sum(total, axis=0)[None, :], mask=vector < width)


def _norm_forward(x, scale, bias, centred, epsilon):
    flat = x.reshape(-1, x.shape[-1])
    vectors = (scale,) if bias is None else (scale, bias)
    y = _call(
        functools.partial(_norm_forward_kernel, centred=centred, epsilon=epsilon),
        (_norm_programs(flat.shape, 1),),
        jax.ShapeDtypeStruct(flat.shape, x.dtype),
        "norm_forward",
    )(flat, *vectors)
    return y.reshape(x.shape), (x, scale, bias)


def _norm_backward(centred, epsilon, saved, grad):
    x, scale, bias = saved
    flat = x.reshape(-1, x.shape[-1])
    programs = _norm_programs(flat.shape, NORM_TILES)
    sums = jax.ShapeDtypeStruct((programs, flat.shape[1]), jnp.float32)
    grad_x, *vectors = _call(
        functools.partial(_norm_backward_kernel, centred=centred, epsilon=epsilon),
        (programs,),
        [jax.ShapeDtypeStruct(flat.shape, x.dtype), sums, *([] if bias is None else [sums])],
        "norm_backward",
    )(flat, grad.reshape(flat.shape), scale)
    totals = [jnp.sum(v, axis=0) for v in vectors]
    return grad_x.reshape(x.shape), totals[0], None if bias is None else totals[1]


norm.defvjp(_norm_forward, _norm_backward)


# Activations: value and slope of each, of an fp32 tile.


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # 0.5 (1 + tanh z) is the logistic function of 2 z, which takes one exponential.
    twice = 2 * math.sqrt(2 / math.pi)
    square = jnp.minimum(x * x, 1e6)  # finite; beyond it the gate is 0 or 1
    gate = 1 / (1 + jnp.exp2(-twice * math.log2(math.e) * x * (1 + 0.044715 * square)))
    return x * gate, gate + gate * (1 - gate) * x * twice * (1 + 3 * 0.044715 * square)


# Not GELU by erf, for which Pallas has no Triton: XLA computes that.
SLOPES: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {"gelu_tanh": _gelu_tanh}


def _activation_tile(row: Any, column: Any, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, columns = ACTIVATION_TILE
    numbers = row * rows + jnp.arange(rows)[:, None]
    places = column * columns + jnp.arange(columns)[None, :]
    return numbers, places, (numbers < shape[0]) & (places < shape[1])


def _activation_forward_kernel(x_ref, bias_ref, out_ref, *, name: str):
    numbers, columns, mask = _activation_tile(pl.program_id(0), pl.program_id(1), x_ref.shape)
    value, _ = SLOPES[name](_load(x_ref, numbers, columns, mask) + _load_vector(bias_ref, columns))
    triton.store(out_ref.at[numbers, columns], value.astype(out_ref.dtype), mask=mask)


def _activation_backward_kernel(x_ref, bias_ref, grad_ref, grad_x_ref, sum_ref, *, name: str):
    program, column = pl.program_id(0), pl.program_id(1)
    _, vector, tile_mask = _activation_tile(0, column, x_ref.shape)
    bias = _load_vector(bias_ref, vector)

    def add(index, total):
        numbers, columns, mask = _activation_tile(program * ACTIVATION_TILES + index, column, x_ref.shape)
        _, slope = SLOPES[name](_load(x_ref, numbers, columns, mask) + bias)
        grad = _load(grad_ref, numbers, columns, mask) * slope
        triton.store(grad_x_ref.at[numbers, columns], grad.astype(grad_x_ref.dtype), mask=mask)
        return total + grad

    total = jax.lax.fori_loop(0, ACTIVATION_TILES, add, jnp.zeros(tile_mask.shape, jnp.float32))
    triton.store(sum_ref.at[program, vector], jnp.sum(total, axis=0)[None, :], mask=vector < x_ref.shape[1])


def _activation_grid(shape: tuple[int, int], tiles: int) -> tuple[int, int]:
    rows, columns = ACTIVATION_TILE
    return pl.cdiv(shape[0], rows * tiles), pl.cdiv(shape[1], columns)


def _activation_forward(x, bias, name):
    flat = x.reshape(-1, x.shape[-1])
    y = _call(
        functools.partial(_activation_forward_kernel, name=name),
        _activation_grid(flat.shape, 1),
        jax.ShapeDtypeStruct(flat.shape, x.dtype),
        "activation_forward",
    )(flat, bias)
    return y.reshape(x.shape), (x, bias)


def _activation_backward(name, saved, grad):
    x, bias = saved
    flat = x.reshape(-1, x.shape[-1])
    grid = _activation_grid(flat.shape, ACTIVATION_TILES)
    grad_x, sums = _call(
        functools.partial(_activation_backward_kernel, name=name),
        grid,
        [
            jax.ShapeDtypeStruct(flat.shape, x.dtype),
            jax.ShapeDtypeStruct((grid[0], flat.shape[1]), jnp.float32),
        ],
        "activation_backward",
    )(flat, bias, grad.reshape(flat.shape))
    return grad_x.reshape(x.shape), jnp.sum(sums, axis=0)


activation.defvjp(_activation_forward, _activation_backward)


def _call(kernel: Callable, grid: tuple[int, ...], out_shape: Any, name: str) -> Callable:
    interpret = jax.default_backend() != "gpu"
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )
