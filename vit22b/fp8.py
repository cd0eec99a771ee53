"""Linear layers whose three matmuls multiply 8-bit floats: forward, gradient of the input, gradient of the kernel.

Formats as in [Micikevicius 2022, FP8 Formats for Deep Learning]: e4m3 (3 bits of mantissa, largest value 448) for
activations and kernels, e5m2 (2 bits, 57,344) for gradients. Every tensor has one scale, from its own largest
magnitude ("current" scaling). Sums are fp32; what comes in and goes out is bf16, kernels and their gradients fp32.

Scales are powers of two. Scaling is then exact in bf16 as in fp32: a value is rounded once, on its way to fp8, and to
the same whatever the scale, but at the bottom of the range. A product is scaled after it was rounded to bf16 as well as
before. Largest magnitudes land on the upper half of the range, 224 to 448 for e4m3; scales that hit the largest value
would gain one binade of range at most, 2^-17 to 1 of the largest magnitude as it is, and 2^-31 to 1 for e5m2.

The largest magnitude is that of the whole tensor, over all devices: values do not depend on the mesh, and a shard can
be gathered after it was quantized, at one byte per element. The price is one all-reduce of a scalar per tensor that is
split; XLA puts those of independent tensors together.

A tensor is quantized once, whatever reads it: one pass finds its largest magnitude, one writes the fp8 values, and for
Hopper, whose fp8 matmuls want the summed dimension to be the last of both operands, the transposed ones with them.
What is kept for the backward pass are fp8 values. Letters as in layers.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b.sharding import HIDDEN, RESIDUAL

FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2


class Quantized(NamedTuple):
    """The tensor `values * scale`."""

    values: jax.Array  # fp8, any shape
    scale: jax.Array  # a power of two, fp32 scalar; infinite where the tensor has a NaN or an infinity


def largest(x: jax.Array) -> jax.Array:
    """The largest magnitude of all elements on all devices, fp32; NaN if any of them is."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def quantize(x: jax.Array, dtype: jnp.dtype, amax: jax.Array | None = None) -> Quantized:
    """`x`, bf16 or fp32, in an fp8 format: scaled, then each element rounded to nearest, ties to even.

    The scale puts `amax` between half of the format's largest value and that value. `amax` (fp32) is that of `x` unless
    given: delayed scaling would enter there, and would have to clip, since larger elements become NaN or infinite.
    A tensor with a NaN or an infinity gets an infinite scale, so that all that is computed from it is NaN or infinite,
    whatever a device's conversion to fp8 makes of such elements.
    """
    amax = largest(x) if amax is None else amax
    # The sign is 0 and the mantissa is cut off: a power of two. Zero gets the smallest normal fp32 number.
    exponent = jax.lax.bitcast_convert_type(amax / float(jnp.finfo(dtype).max), jnp.int32) & 0x7F80_0000
    scale = jnp.maximum(2 * jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-126)
    # The inverse, 2^-k for 2^k, by its bits: exact, which a GPU's division need not be.
    inverse = jax.lax.bitcast_convert_type(0x7F00_0000 - jax.lax.bitcast_convert_type(scale, jnp.int32), jnp.float32)
    return Quantized((x * inverse.astype(x.dtype)).astype(dtype), scale)


def quantize_each(arrays: list[jax.Array], dtype: jnp.dtype, regions: tuple[str, ...]) -> list[Quantized]:
    """Each array quantized, under the scope of its region."""
    found = []
    for x, region in zip(arrays, regions, strict=True):
        with jax.named_scope(region):
            found.append(quantize(x, dtype))
    return found


def whole(q: Quantized, dim: int) -> Quantized:
    """The same with one dimension gathered, in fp8."""
    spec = list(jax.typeof(q.values).sharding.spec)
    spec[dim] = None
    return Quantized(reshard(q.values, P(*spec)), q.scale)


def product(equation: str, a: Quantized, b: Quantized, out_sharding: P) -> jax.Array:
    """The einsum of two quantized tensors: fp32 sums, rounded to bf16; the scales change no more than exponents.

    XLA for GPUs moves the scales into the matmul. The other way to write it, as a matmul of arrays that were turned
    back into bf16, becomes an fp8 matmul only where XLA's Triton matmuls are off, and one in bf16 otherwise.
    """
    y = jnp.einsum(equation, a.values, b.values, preferred_element_type=jnp.bfloat16, out_sharding=out_sharding)
    return y * (a.scale * b.scale).astype(jnp.bfloat16)


def products(
    equation: str, lefts: list[Quantized], rights: list[Quantized], specs: list[P], regions: tuple[str, ...]
) -> list[jax.Array]:
    """The einsum of each pair, under the scope of its region."""
    found = []
    for left, right, spec, region in zip(lefts, rights, specs, regions, strict=True):
        with jax.named_scope(region):
            found.append(product(equation, left, right, spec))
    return found


def total(terms: list[jax.Array]) -> jax.Array:
    """Their sum, each new product the first operand: the one that XLA tries as the matmul to add the other to."""
    return functools.reduce(lambda so_far, new: new + so_far, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def column(x_BTD: jax.Array, kernels: list[jax.Array], regions: tuple[str, ...]) -> list[jax.Array]:
    """`x @ w`, bf16 (B, T, K) as HIDDEN, for each kernel w: x is bf16 (B, T, D) as RESIDUAL, w fp32 (D, K), split as
    `linear.KERNEL_IN`. So are the gradients. `regions`: the scope of each kernel's matmuls.
    """
    return _column_forward(x_BTD, kernels, regions)[0]


def _column_forward(x_BTD: jax.Array, kernels: list[jax.Array], regions: tuple[str, ...]) -> tuple:
    x, ws = quantize(x_BTD, FORWARD), quantize_each(kernels, FORWARD, regions)
    ys = products("btd,dk->btk", [whole(x, 2)] * len(ws), [whole(w, 0) for w in ws], [HIDDEN] * len(ws), regions)
    # Without the barrier XLA 0.11 makes GELU a part of the matmul, writing its input beside its output, and then fails
    # to compile: "RET_CHECK failure (thunk_emitter.cc) !has_aux_output"; it has that for bf16 matmuls alone.
    return [jax.lax.optimization_barrier(y) for y in ys], (x, ws)


def _column_backward(regions: tuple[str, ...], saved: tuple, dys_BTK: list[jax.Array]) -> tuple:
    x, ws = saved
    dys = quantize_each(dys_BTK, BACKWARD, regions)
    dxs = products("btk,dk->btd", dys, [whole(w, 0) for w in ws], [RESIDUAL] * len(ws), regions)
    dws = products("btd,btk->dk", [whole(x, 2)] * len(ws), dys, [_spec(w) for w in ws], regions)
    return total(dxs), [dw.astype(jnp.float32) for dw in dws]


column.defvjp(_column_forward, _column_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def row(inputs: list[jax.Array], kernels: list[jax.Array], regions: tuple[str, ...]) -> jax.Array:
    """The sum over pairs of `x @ w`: bf16 (B, T, K) as HIDDEN and fp32 (K, D), split as `linear.KERNEL_OUT`, give
    bf16 (B, T, D) as RESIDUAL. So are the gradients.
    """
    return _row_forward(inputs, kernels, regions)[0]


def _row_forward(inputs: list[jax.Array], kernels: list[jax.Array], regions: tuple[str, ...]) -> tuple:
    xs, ws = quantize_each(inputs, FORWARD, regions), quantize_each(kernels, FORWARD, regions)
    ys = products("btk,kd->btd", xs, [whole(w, 1) for w in ws], [RESIDUAL] * len(ws), regions)
    return total(ys), (xs, ws)


def _row_backward(regions: tuple[str, ...], saved: tuple, dy_BTD: jax.Array) -> tuple:
    xs, ws = saved
    dy = whole(quantize(dy_BTD, BACKWARD), 2)
    dxs = products("btd,kd->btk", [dy] * len(ws), [whole(w, 1) for w in ws], [HIDDEN] * len(ws), regions)
    dws = products("btk,btd->kd", xs, [dy] * len(ws), [_spec(w) for w in ws], regions)
    return dxs, [dw.astype(jnp.float32) for dw in dws]


row.defvjp(_row_forward, _row_backward)


def _spec(q: Quantized) -> P:
    return jax.typeof(q.values).sharding.spec
