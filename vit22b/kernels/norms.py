"""Kernels of norms over the last dimension.

A program holds some whole rows. Blocks have sizes of powers of two; a row of another width is taken in pieces, 1152 as
1024 and 128, so that few places lie idle.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vit22b.kernels.tiles import call, load, load_vector, store, tile

VALUES = 4_096  # of a tile
WARPS = 4
# Tiles that a program of the backward pass goes through, summing for scale and bias in registers; but one where a tile
# has MANY_ROWS: then its sums alone are next to nothing, and registers are better spent on more programs at once.
TILES = 8
MANY_ROWS = 32
MAX_WIDTH = 8_192  # of a row
MAX_PIECES = 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, centred: bool, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last dim, of arrays on one device.

    `x`: (..., W) bf16 with W at most MAX_WIDTH; `scale`, `bias`: (W,) fp32. Not `centred`: the mean counts as 0.
    Returns bf16; statistics and products are fp32. Only the arguments are kept for the backward pass.
    """
    return _forward(x, scale, bias, centred, epsilon)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def branch_off(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, centred: bool, epsilon: float, count: int
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """x as it is, its norm, and for each of `count` readers of that a slot for their gradient (see `take`).

    One kernel then reads all of these gradients and that of x, the residual stream's, and adds them up.
    """
    y = norm(x, scale, bias, centred, epsilon)
    return x, y, [jnp.zeros_like(x)] * count


@jax.custom_vjp
def take(y: jax.Array, slot: jax.Array) -> jax.Array:
    """y, whose gradient goes to `slot` instead: that of several readers of one array stays apart.

    `slot` is not computed: nothing reads it. Nor does a reader keep a y of its own, as it would of one per reader.
    """
    return y


def _pieces(width: int) -> list[tuple[int, int]]:
    """Start and size of the pieces of a row, sizes powers of two and at least 8; the last may reach beyond its end."""
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < width:
        size = pl.next_power_of_2(width - start)
        if size > max(width - start, 8) and len(pieces) < MAX_PIECES - 1:
            size //= 2
        pieces.append((start, size))
        start += size
    return pieces


def _rows(width: int) -> int:
    """Rows of a tile: the power of two that comes nearest to VALUES from below."""
    return max(1, pl.next_power_of_2(VALUES // width + 1) // 2)


def _warps(width: int) -> int:
    """Of a program of the backward pass: half of them where the tile is well below VALUES, as many others then run."""
    return WARPS // 2 if _rows(width) * width < 3 * VALUES // 4 else WARPS


def _tiles(width: int) -> int:
    """Tiles that a program of the backward pass goes through."""
    return 1 if _rows(width) >= MANY_ROWS else TILES


def _programs(shape: tuple[int, ...], tiles: int) -> int:
    return pl.cdiv(shape[0], _rows(shape[1]) * tiles)


def _places(index: Any, shape: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Row and column numbers and mask of each piece of the rows of a tile."""
    found = []
    for start, size in _pieces(shape[1]):
        rows, columns, _ = tile(index, 0, (_rows(shape[1]), size), shape)
        columns = columns + start
        found.append((rows, columns, (rows < shape[0]) & (columns < shape[1])))
    return found


def _sum(pieces: Sequence[jax.Array]) -> jax.Array:
    """Over rows that are given in pieces: (R, 1)."""
    return functools.reduce(jnp.add, [jnp.sum(piece, axis=1, keepdims=True) for piece in pieces])


def _normed(
    xs: list[jax.Array], places: list, width: int, centred: bool, epsilon: float
) -> tuple[list[jax.Array], jax.Array]:
    """Rows before scale and bias, zero beyond the width, and 1 / their standard deviation, (R, 1)."""
    if centred:
        mean = _sum(xs) / width
        xs = [jnp.where(mask, x - mean, 0.0) for x, (_, _, mask) in zip(xs, places, strict=True)]
    inverse = jax.lax.rsqrt(_sum([x * x for x in xs]) / width + epsilon)
    return [x * inverse for x in xs], inverse


def _forward_kernel(x_ref, scale_ref, *refs, centred: bool, epsilon: float):
    *bias_ref, out_ref = refs
    places = _places(pl.program_id(0), x_ref.shape)
    xs = [load(x_ref, *place) for place in places]
    for y, place in zip(_normed(xs, places, x_ref.shape[1], centred, epsilon)[0], places, strict=True):
        y = y * load_vector(scale_ref, place[1])
        if bias_ref:
            y = y + load_vector(bias_ref[0], place[1])
        store(out_ref, *place, y)


def _backward_kernel(x_ref, scale_ref, *refs, centred: bool, epsilon: float, num_grads: int, residual: bool):
    """`refs`: gradients of what readers took; that of the stream, where it is `residual`; the gradient of x; a row per
    program of sums for the gradients of scale and, where there is one, bias.
    """
    grad_refs, refs = refs[:num_grads], refs[num_grads:]
    residual_refs, (grad_x_ref, *sum_refs) = refs[:residual], refs[residual:]
    program, width = pl.program_id(0), x_ref.shape[1]
    tiles = _tiles(width)
    vectors = [columns for _, columns, _ in _places(0, x_ref.shape)]
    scales = [load_vector(scale_ref, vector) for vector in vectors]

    def gradient(index):
        """Stores that of x; what it adds to each sum, in pieces."""
        places = _places(program * tiles + index, x_ref.shape)
        normed, inverse = _normed([load(x_ref, *place) for place in places], places, width, centred, epsilon)
        grads = [functools.reduce(jnp.add, [load(ref, *place) for ref in grad_refs]) for place in places]
        parts = [[g * n for g, n in zip(grads, normed, strict=True)], grads][: len(sum_refs)]
        grads = [g * scale for g, scale in zip(grads, scales, strict=True)]
        along = _sum([g * n for g, n in zip(grads, normed, strict=True)]) / width
        mean = _sum(grads) / width if centred else 0.0
        for g, n, place in zip(grads, normed, places, strict=True):
            out = (g - n * along - mean) * inverse
            for ref in residual_refs:
                out = out + load(ref, *place)
            store(grad_x_ref, *place, out)
        return parts

    sums = gradient(0)
    if tiles > 1:
        sums = jax.lax.fori_loop(1, tiles, lambda i, sums: jax.tree.map(jnp.add, sums, gradient(i)), sums)
    for ref, totals in zip(sum_refs, sums, strict=True):
        for total, vector in zip(totals, vectors, strict=True):
            triton.store(ref.at[program, vector], jnp.sum(total, axis=0)[None, :], mask=vector < width)


def _forward(x, scale, bias, centred, epsilon):
    flat = x.reshape(-1, x.shape[-1])
    vectors = (scale,) if bias is None else (scale, bias)
    y = call(
        functools.partial(_forward_kernel, centred=centred, epsilon=epsilon),
        (_programs(flat.shape, 1),),
        jax.ShapeDtypeStruct(flat.shape, x.dtype),
        "norm_forward",
        WARPS,
    )(flat, *vectors)
    return y.reshape(x.shape), (x, scale, bias)


def _gradients(saved, centred, epsilon, grads, residual):
    """Those of x, scale and bias. `grads`: of the norm, one for each reader; `residual`: of x itself, in a list."""
    x, scale, bias = saved
    flat = x.reshape(-1, x.shape[-1])
    programs = _programs(flat.shape, _tiles(flat.shape[1]))
    sums = jax.ShapeDtypeStruct((programs, flat.shape[1]), jnp.float32)
    kernel = functools.partial(
        _backward_kernel, centred=centred, epsilon=epsilon, num_grads=len(grads), residual=bool(residual)
    )
    grad_x, *vectors = call(
        kernel,
        (programs,),
        [jax.ShapeDtypeStruct(flat.shape, x.dtype), sums, *([] if bias is None else [sums])],
        "norm_backward",
        _warps(flat.shape[1]),
    )(flat, scale, *(g.reshape(flat.shape) for g in (*grads, *residual)))
    totals = [jnp.sum(v, axis=0) for v in vectors]
    return grad_x.reshape(x.shape), totals[0], None if bias is None else totals[1]


def _backward(centred, epsilon, saved, grad):
    return _gradients(saved, centred, epsilon, [grad], [])


def _branch_off_forward(x, scale, bias, centred, epsilon, count):
    y, saved = _forward(x, scale, bias, centred, epsilon)
    return (x, y, [jnp.zeros_like(x)] * count), saved


def _branch_off_backward(centred, epsilon, count, saved, grads):
    residual, _, grads = grads  # none of the norm itself: all readers have slots
    return _gradients(saved, centred, epsilon, grads, [residual])


norm.defvjp(_forward, _backward)
branch_off.defvjp(_branch_off_forward, _branch_off_backward)
take.defvjp(lambda y, slot: (y, None), lambda _, grad: (None, grad))
