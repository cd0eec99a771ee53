"""Linear layers whose three matmuls multiply 8-bit floats: forward, gradient of the input, gradient of the kernel.

Formats as in [Micikevicius 2022, FP8 Formats for Deep Learning]: e4m3 (3 bits of mantissa, largest value 448) for
activations and kernels, e5m2 (2 bits, 57,344) for gradients. Every tensor has one scale, from a magnitude that none of
its elements exceeds. Sums are fp32; what comes in and goes out is bf16, kernels and their gradients fp32.

Scales are powers of two. Scaling is then exact in bf16 as in fp32: a value is rounded once, on its way to fp8, and to
the same whatever the scale, but at the bottom of the range. A product is scaled after it was rounded to bf16 as well as
before. Largest magnitudes land on the upper half of the range, 224 to 448 for e4m3.

Most tensors are scaled by their own largest magnitude ("current" scaling), which takes a pass over them. What a norm
gives and what lies between an MLP's two matmuls is scaled by a bound instead, which takes none, so that the kernel that
computes it rounds it, too. A row of a norm has a known length L (layers.Norm.length). By Cauchy and Schwarz its product
with a column of the kernel is no larger than L times that column's length, GELU makes nothing larger, and its slope is
1.13 at most; a gradient's row has the length of its largest magnitude times the root of its width at most. For normal
values bounds exceed the largest magnitudes by a factor of 8 (forward) and 52 (backward) at width 1024, of 21 and 125 at
6144; that costs as many binades of the 2^-15 to 1 (e4m3) or 2^-30 to 1 (e5m2) that normal numbers span below a bound.
Bounds depend on nothing but the step's own tensors: there is no history to keep, as delayed scaling does, and nothing
to clip.

Magnitudes are those of whole tensors, over all devices: values do not depend on the mesh, and a shard can be gathered
after it was quantized, at one byte per element. The price is one all-reduce of a scalar per tensor that is split; XLA
puts those of independent tensors together.

Hopper's fp8 matmuls want the dimension that they sum over to be the last of both operands. So a tensor is written in
two layouts, by one pass, whatever reads them. What is kept for the backward pass are fp8 values, and what enters the
activation. Letters as in layers.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b.activations import ACTIVATIONS, STEEPEST
from vit22b.kernels import activations as kernels
from vit22b.kernels.tiles import fits
from vit22b.sharding import BATCH, COLUMN, HIDDEN, RESIDUAL, ROW, SPLIT, TRANSPOSED

FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2
MARGIN = 1.25  # on bounds of products: their operands were rounded to fp8, by up to 2^-3 and 2^-4


class Quantized(NamedTuple):
    """The tensor `values * scale`."""

    values: jax.Array  # fp8, any shape
    transposed: jax.Array  # the same with the last dimension first
    scale: jax.Array  # a power of two, fp32 scalar; infinite where the tensor has a NaN or an infinity


def largest(x: jax.Array) -> jax.Array:
    """The largest magnitude of all elements on all devices, fp32; NaN if any of them is."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def scale_and_inverse(amax: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The power of two that puts `amax` (fp32 scalar) between half of the format's largest value and that value, and
    its inverse. Infinite where `amax` is not finite, so that all that is computed from the tensor is NaN or infinite,
    whatever a device's conversion to fp8 makes of such elements.
    """
    # The sign is 0 and the mantissa is cut off: a power of two. Zero gets the smallest normal fp32 number.
    exponent = jax.lax.bitcast_convert_type(amax / float(jnp.finfo(dtype).max), jnp.int32) & 0x7F80_0000
    scale = jnp.maximum(2 * jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-126)
    # The inverse, 2^-k for 2^k, by its bits: exact, which a GPU's division need not be.
    return scale, jax.lax.bitcast_convert_type(
        0x7F00_0000 - jax.lax.bitcast_convert_type(scale, jnp.int32), jnp.float32
    )


def quantize(x: jax.Array, dtype: jnp.dtype, amax: jax.Array | None = None, pallas: bool = False) -> Quantized:
    """`x`, bf16 or fp32, in an fp8 format: scaled, then each element rounded to nearest, ties to even.

    `amax`: what no magnitude in `x` exceeds, an fp32 scalar; without it, the largest. `pallas`: by a kernel for GPUs
    if it fits; `x` is then a (B, T, K) as HIDDEN.
    """
    scale, inverse = scale_and_inverse(largest(x) if amax is None else amax, dtype)
    if not (pallas and fits(x)):
        return in_both_layouts((x * inverse.astype(x.dtype)).astype(dtype), scale)
    run = functools.partial(kernels.quantize, dtype=dtype)
    on_shards = jax.shard_map(run, in_specs=(HIDDEN, P()), out_specs=[HIDDEN, TRANSPOSED], check_vma=False)
    values, transposed = on_shards(x, inverse)
    return Quantized(values, transposed, scale)


def quantize_each(
    arrays: list[jax.Array], dtype: jnp.dtype, regions: tuple[str, ...], pallas: bool = False
) -> list[Quantized]:
    """Each array quantized, under the scope of its region."""
    found = []
    for x, region in zip(arrays, regions, strict=True):
        with jax.named_scope(region):
            found.append(quantize(x, dtype, pallas=pallas))
    return found


def in_both_layouts(values: jax.Array, scale: jax.Array) -> Quantized:
    """fp8 values as a quantized tensor."""
    return Quantized(values, jnp.moveaxis(values, -1, 0), scale)


def whole(values: jax.Array, dim: int) -> jax.Array:
    """The same with one dimension gathered, in fp8."""
    spec = list(jax.typeof(values).sharding.spec)
    spec[dim] = None
    return reshard(values, P(*spec))


def product(equation: str, a: jax.Array, b: jax.Array, scales: tuple, out_sharding: P) -> jax.Array:
    """The einsum of two fp8 arrays times both scales: fp32 sums, rounded to bf16; scales change no more than exponents.

    XLA for GPUs moves the scales into the matmul. The other way to write it, as a matmul of arrays that were turned
    back into bf16, becomes an fp8 matmul only where XLA's Triton matmuls are off, and one in bf16 otherwise.
    """
    y = jnp.einsum(equation, a, b, preferred_element_type=jnp.bfloat16, out_sharding=out_sharding)
    return y * (scales[0] * scales[1]).astype(jnp.bfloat16)


def total(terms: list[jax.Array]) -> jax.Array:
    """Their sum, each new product the first operand: the one that XLA tries as the matmul to add the other to."""
    return functools.reduce(lambda so_far, new: new + so_far, terms)


# The three matmuls of a kernel that is split as `linear.KERNEL_IN`, and of one that lies as `linear.kernel_out` says.


def into(x: Quantized, w: Quantized) -> jax.Array:
    """(B, T, D) as RESIDUAL times (D, K): (B, T, K) as HIDDEN."""
    y = product("btd,kd->btk", whole(x.values, 2), reshard(w.transposed, ROW), (x.scale, w.scale), HIDDEN)
    # Without the barrier XLA 0.11 makes GELU a part of the matmul, writing its input beside its output, and then fails
    # to compile: "RET_CHECK failure (thunk_emitter.cc) !has_aux_output"; it has that for bf16 matmuls alone.
    return jax.lax.optimization_barrier(y)


def into_backward(x: Quantized, w: Quantized, dy: Quantized) -> tuple[jax.Array, jax.Array]:
    """Gradients of x, bf16, and w, fp32. Of `x` its transposed values are used, of `w` the others."""
    dx = product("btk,dk->btd", dy.values, reshard(w.values, COLUMN), (dy.scale, w.scale), RESIDUAL)
    spec = jax.typeof(w.values).sharding.spec
    dw = product("dbt,kbt->dk", whole(x.transposed, 0), dy.transposed, (x.scale, dy.scale), spec)
    return dx, dw.astype(jnp.float32)


def back(x: Quantized, w: Quantized) -> jax.Array:
    """(B, T, K) as HIDDEN times (K, D): (B, T, D) as RESIDUAL."""
    return product("btk,dk->btd", x.values, reshard(w.transposed, COLUMN), (x.scale, w.scale), RESIDUAL)


def back_backward(x: Quantized, w: Quantized, dy: Quantized) -> tuple[jax.Array, jax.Array]:
    """Gradients of x, bf16, and w, fp32. Of `x` its transposed values are used, of `w` the others."""
    dx = product("btd,kd->btk", whole(dy.values, 2), reshard(w.values, ROW), (dy.scale, w.scale), HIDDEN)
    spec = jax.typeof(w.values).sharding.spec
    dw = product("kbt,dbt->kd", x.transposed, whole(dy.transposed, 0), (x.scale, dy.scale), spec)
    return dx, dw.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def column(
    x_BTD: jax.Array, length: jax.Array, kernels: list[jax.Array], regions: tuple[str, ...], pallas: bool
) -> list[jax.Array]:
    """`x @ w`, bf16 (B, T, K) as HIDDEN, for each kernel w: x is bf16 (B, T, D) as RESIDUAL, w fp32 (D, K), split as
    `linear.KERNEL_IN`. So are the gradients. `length`: fp32, what no row of x exceeds in length. `regions`: the scope
    of each kernel's matmuls. `pallas`: whether kernels for GPUs quantize.
    """
    return _column_forward(x_BTD, length, kernels, regions, pallas)[0]


def _column_forward(x_BTD, length, kernels, regions, pallas):
    x, ws, ys = quantize(x_BTD, FORWARD, length, pallas), quantize_each(kernels, FORWARD, regions), []
    for w, region in zip(ws, regions, strict=True):
        with jax.named_scope(region):
            ys.append(into(x, w))
    return ys, (x, ws)


def _column_backward(regions, pallas, saved, dys_BTK):
    x, ws = saved
    dxs, dws = [], []
    for w, dy, region in zip(ws, quantize_each(dys_BTK, BACKWARD, regions, pallas), regions, strict=True):
        with jax.named_scope(region):
            dx, dw = into_backward(x, w, dy)
        dxs.append(dx)
        dws.append(dw)
    return total(dxs), None, dws


column.defvjp(_column_forward, _column_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def row(inputs: list[jax.Array], kernels: list[jax.Array], regions: tuple[str, ...], pallas: bool) -> jax.Array:
    """The sum over pairs of `x @ w`: bf16 (B, T, K) as HIDDEN and fp32 (K, D), split as `linear.kernel_out` says, give
    bf16 (B, T, D) as RESIDUAL. So are the gradients.
    """
    return _row_forward(inputs, kernels, regions, pallas)[0]


def _row_forward(inputs, kernels, regions, pallas):
    xs, ws = quantize_each(inputs, FORWARD, regions, pallas), quantize_each(kernels, FORWARD, regions)
    ys = []
    for x, w, region in zip(xs, ws, regions, strict=True):
        with jax.named_scope(region):
            ys.append(back(x, w))
    return total(ys), (xs, ws)


def _row_backward(regions, pallas, saved, dy_BTD):
    dy = quantize(dy_BTD, BACKWARD, pallas=pallas)
    dxs, dws = [], []
    for x, w, region in zip(*saved, regions, strict=True):
        with jax.named_scope(region):
            dx, dw = back_backward(x, w, dy)
        dxs.append(dx)
        dws.append(dw)
    return dxs, dws


row.defvjp(_row_forward, _row_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mlp(
    x_BTD: jax.Array, length: jax.Array, up: jax.Array, bias: jax.Array, down: jax.Array, name: str, pallas: bool
) -> jax.Array:
    """`f(x @ up + bias) @ down`, with what is in between in fp8 for the matmuls on either side.

    As of `column` and `row`; `bias` is fp32 (F,), split as F is; f is ACTIVATIONS[name], a key of STEEPEST.
    """
    return _mlp_forward(x_BTD, length, up, bias, down, name, pallas)[0]


def _mlp_forward(x_BTD, length, up, bias, down, name, pallas):
    x, (w_up, w_down) = quantize(x_BTD, FORWARD, length, pallas), (quantize(w, FORWARD) for w in (up, down))
    y_BTF = into(x, w_up)
    # |f(y)| <= |y| <= the row's length times the column's.
    limit = MARGIN * length * longest(w_up.transposed) * w_up.scale + largest(bias)
    hidden = _activate(y_BTF, bias, limit, name, pallas)
    return back(hidden, w_down), (x, w_up, y_BTF, bias, hidden, w_down)


def _mlp_backward(name, pallas, saved, dz_BTD):
    x, w_up, y_BTF, bias, hidden, w_down = saved
    amax = largest(dz_BTD)
    dhidden_BTF, ddown = back_backward(hidden, w_down, quantize(dz_BTD, BACKWARD, amax, pallas))
    length = amax * math.sqrt(dz_BTD.shape[-1])  # of a row of dz
    limit = MARGIN * STEEPEST[name] * length * longest(w_down.values) * w_down.scale
    dy, dbias = _slope(y_BTF, bias, dhidden_BTF, limit, name, pallas)
    dx_BTD, dup = into_backward(x, w_up, dy)
    return dx_BTD, None, dup, dbias, ddown


mlp.defvjp(_mlp_forward, _mlp_backward)


def longest(values: jax.Array) -> jax.Array:
    """The largest length of a row of an fp8 matrix, fp32."""
    return jnp.sqrt(jnp.max(jnp.sum(jnp.square(values.astype(jnp.float32)), axis=1)))


def _activate(y_BTF: jax.Array, bias_F: jax.Array, limit: jax.Array, name: str, pallas: bool) -> Quantized:
    """The activation of y + bias, which does not exceed `limit`."""
    scale, inverse = scale_and_inverse(limit, FORWARD)
    if not (pallas and fits(y_BTF)):
        hidden = ACTIVATIONS[name](y_BTF.astype(jnp.float32) + bias_F) * inverse
        return in_both_layouts(hidden.astype(FORWARD), scale)
    values, transposed = jax.shard_map(
        functools.partial(kernels.activate_to_fp8, name=name, dtype=FORWARD),
        in_specs=(HIDDEN, SPLIT, P()),
        out_specs=[HIDDEN, TRANSPOSED],
        check_vma=False,
    )(y_BTF, bias_F, inverse)
    return Quantized(values, transposed, scale)


def _slope(
    y_BTF: jax.Array, bias_F: jax.Array, grad_BTF: jax.Array, limit: jax.Array, name: str, pallas: bool
) -> tuple[Quantized, jax.Array]:
    """`grad` times the activation's slope at y + bias, which does not exceed `limit`; and its sum over tokens, (F,)."""
    scale, inverse = scale_and_inverse(limit, BACKWARD)
    if not (pallas and fits(y_BTF)):
        _, vjp = jax.vjp(ACTIVATIONS[name], y_BTF.astype(jnp.float32) + bias_F)
        (dy_BTF,) = vjp(grad_BTF.astype(jnp.float32))
        dy8_BTF = (dy_BTF * inverse).astype(BACKWARD)
        return in_both_layouts(dy8_BTF, scale), jnp.sum(dy_BTF, (0, 1))
    values, transposed, sums = jax.shard_map(
        functools.partial(kernels.slope_to_fp8, name=name, dtype=BACKWARD),
        in_specs=(HIDDEN, SPLIT, HIDDEN, P()),
        out_specs=[HIDDEN, TRANSPOSED, P(*BATCH, *SPLIT)],  # a row of sums per shard of the batch
        check_vma=False,
    )(y_BTF, bias_F, grad_BTF, inverse)
    return Quantized(values, transposed, scale), jnp.sum(sums, axis=0)
