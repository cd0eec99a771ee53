"""Kernels of activations: a bias and an activation in one pass, and, where fp8 matmuls read the result, its rounding.

What is rounded to fp8 is written twice, as it is and transposed: Hopper's fp8 matmuls want the dimension that they sum
over to be the last of both operands, and the one over tokens is another than the one over channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vit22b.kernels.tiles import call, load, load_vector, store, tile

TILE, WARPS = (16, 256), 4  # rows and columns of a program, and what computes it
# Where columns are summed or written, too: half a cache line of each.
SQUARE_TILE, SQUARE_WARPS = (64, 128), 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def activate(x: jax.Array, bias: jax.Array, name: str) -> jax.Array:
    """The activation `name` of x + bias, of arrays on one device; computed in fp32.

    `x`: (..., F) bf16; `bias`: (F,) fp32; `name`: a key of SLOPES. Returns bf16. Only the arguments are kept.
    """
    return _activate_forward(x, bias, name)[0]


def quantize(x: jax.Array, inverse: jax.Array, dtype: Any) -> list[jax.Array]:
    """x * inverse in fp8: as `x`, (B, T, F) bf16, and with the last dimension first, (F, B, T).

    `inverse`: fp32 scalar. The product must not exceed the largest value of `dtype`; so for the two functions below.
    """
    return _to_fp8(_quantize_kernel, "quantize", dtype, x, inverse)


def activate_to_fp8(x: jax.Array, bias: jax.Array, inverse: jax.Array, name: str, dtype: Any) -> list[jax.Array]:
    """The activation of x + bias, times `inverse`, in fp8: (B, T, F) and (F, B, T)."""
    return _to_fp8(functools.partial(_forward_kernel, name=name), "activation_forward", dtype, x, inverse, bias)


def slope_to_fp8(
    x: jax.Array, bias: jax.Array, grad: jax.Array, inverse: jax.Array, name: str, dtype: Any
) -> list[jax.Array]:
    """`grad` times the activation's slope at x + bias, times `inverse`, in fp8: (B, T, F) and (F, B, T).

    The third result, (1, F) fp32, is the sum over all tokens without `inverse`: the bias's gradient.
    """
    kernel = functools.partial(_backward_kernel, name=name)
    grad = grad.reshape(-1, grad.shape[-1])
    *pair, sums = _to_fp8(kernel, "activation_backward", dtype, x, inverse, bias, grad, sums=True)
    return [*pair, jnp.sum(sums, axis=0, keepdims=True)]


def _to_fp8(
    kernel: Callable, name: str, dtype: Any, x: jax.Array, inverse: jax.Array, *rest: jax.Array, sums: bool = False
) -> list[jax.Array]:
    """The kernel's results for `x` as a matrix: values and their transposed, and a row of `sums` per row of tiles."""
    flat = x.reshape(-1, x.shape[-1])
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape in (flat.shape, flat.shape[::-1])]
    outs += [_sums(flat.shape)] if sums else []
    run = call(kernel, _grid(flat.shape, SQUARE_TILE), outs, name, SQUARE_WARPS)
    values, transposed, *others = run(flat, *rest, inverse.reshape(1))
    return [values.reshape(x.shape), transposed.reshape(x.shape[-1:] + x.shape[:-1]), *others]


# Value and slope of each, of an fp32 tile.


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # 0.5 (1 + tanh z) is the logistic function of 2 z, which takes one exponential.
    twice = 2 * math.sqrt(2 / math.pi)
    square = jnp.minimum(x * x, 1e6)  # finite; beyond it the gate is 0 or 1
    gate = 1 / (1 + jnp.exp2(-twice * math.log2(math.e) * x * (1 + 0.044715 * square)))
    return x * gate, gate + gate * (1 - gate) * x * twice * (1 + 3 * 0.044715 * square)


# Not GELU by erf, for which Pallas has no Triton: XLA computes that.
SLOPES: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {"gelu_tanh": _gelu_tanh}


def _grid(shape: tuple[int, ...], tile_shape: tuple[int, int]) -> tuple[int, int]:
    return pl.cdiv(shape[0], tile_shape[0]), pl.cdiv(shape[1], tile_shape[1])


def _sums(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A row per row of tiles."""
    return jax.ShapeDtypeStruct((_grid(shape, SQUARE_TILE)[0], shape[1]), jnp.float32)


def _store_pair(refs: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array, value: jax.Array) -> None:
    values_ref, transposed_ref = refs
    value = value.astype(values_ref.dtype)
    store(values_ref, rows, columns, mask, value)
    store(transposed_ref, columns.T, rows.T, mask.T, value.T)


def _quantize_kernel(x_ref, inverse_ref, *out_refs):
    rows, columns, mask = tile(pl.program_id(0), pl.program_id(1), SQUARE_TILE, x_ref.shape)
    _store_pair(out_refs, rows, columns, mask, load(x_ref, rows, columns, mask) * inverse_ref[0])


def _forward_kernel(x_ref, bias_ref, *refs, name: str):
    """`refs`: the result in bf16; or the inverse scale, the result in fp8 and that transposed."""
    tile_shape = TILE if len(refs) == 1 else SQUARE_TILE
    rows, columns, mask = tile(pl.program_id(0), pl.program_id(1), tile_shape, x_ref.shape)
    value, _ = SLOPES[name](load(x_ref, rows, columns, mask) + load_vector(bias_ref, columns))
    if len(refs) == 1:
        store(refs[0], rows, columns, mask, value)
    else:
        _store_pair(refs[1:], rows, columns, mask, value * refs[0][0])


def _backward_kernel(x_ref, bias_ref, grad_ref, *refs, name: str):
    """`refs`: as in the forward pass, then a row per row of tiles of sums for the bias's gradient."""
    *out_refs, sum_ref = refs
    rows, columns, mask = tile(pl.program_id(0), pl.program_id(1), SQUARE_TILE, x_ref.shape)
    _, slope = SLOPES[name](load(x_ref, rows, columns, mask) + load_vector(bias_ref, columns))
    grad = load(grad_ref, rows, columns, mask) * slope
    sums = jnp.sum(grad, axis=0)[None, :]
    triton.store(sum_ref.at[pl.program_id(0), columns], sums, mask=columns < x_ref.shape[1])
    if len(out_refs) == 1:
        store(out_refs[0], rows, columns, mask, grad)
    else:
        _store_pair(out_refs[1:], rows, columns, mask, grad * out_refs[0][0])


def _activate_forward(x, bias, name):
    flat = x.reshape(-1, x.shape[-1])
    kernel, out = functools.partial(_forward_kernel, name=name), jax.ShapeDtypeStruct(flat.shape, x.dtype)
    y = call(kernel, _grid(flat.shape, TILE), out, "activation_forward", WARPS)(flat, bias)
    return y.reshape(x.shape), (x, bias)


def _activate_backward(name, saved, grad):
    x, bias = saved
    flat = x.reshape(-1, x.shape[-1])
    outs = [jax.ShapeDtypeStruct(flat.shape, x.dtype), _sums(flat.shape)]
    kernel = functools.partial(_backward_kernel, name=name)
    run = call(kernel, _grid(flat.shape, SQUARE_TILE), outs, "activation_backward", SQUARE_WARPS)
    grad_x, sums = run(flat, bias, grad.reshape(flat.shape))
    return grad_x.reshape(x.shape), jnp.sum(sums, axis=0)


activate.defvjp(_activate_forward, _activate_backward)
