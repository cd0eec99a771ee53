"""Collectives in rings, so that communication runs beside matmuls: ViT-22B's asynchronous parallel linear operations
[Dehghani 2023, section 3.2; the decomposition as in Wang et al. 2022, "Overlap Communication with Dependent
Computation via Decomposition"].

A ring's hop is a collective-permute between neighbours, which compilers start early and finish late; what one hop
brings is multiplied while the next is under way. Half of the chunks travel in either direction. Everything here runs
inside `jax.shard_map` on one device's shards; a mesh axis of size 1 costs nothing. Gradients are rings, too: that of
a gather is a scatter and the other way round, so backward passes are written out instead of derived.

Letters as in layers.py; d is one device's part of D.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from vit22b.matmul import matmul


def hop(x: jax.Array, axis: str, step: int) -> jax.Array:
    """What the neighbour `step` (1 or -1) places before on the ring holds."""
    count = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + step) % count) for i in range(count)])


def gathered(x: jax.Array, axis: str) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Every device's `x`, each with the device's index: first its own, then as they arrive from both sides."""
    count, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    yield index, x
    before = after = x
    for distance in range(1, count // 2 + 1):
        before = hop(before, axis, 1)
        if 2 * distance < count:
            after = hop(after, axis, -1)
        yield (index - distance) % count, before
        if 2 * distance < count:
            yield (index + distance) % count, after


def scattered(part: Callable[[jax.Array], jax.Array], axis: str) -> jax.Array:
    """The sum over devices of `part(index)`, each for the device of that index.

    Two sums travel towards each device, one from either side, and grow on the way.
    """
    count, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def travel(hops: int, step: int) -> jax.Array:
        total = part((index + step * hops) % count)
        for left in range(hops - 1, 0, -1):
            total = hop(total, axis, step) + part((index + step * left) % count)
        return hop(total, axis, step)

    sums = [travel(hops, step) for hops, step in ((count // 2, 1), ((count - 1) // 2, -1)) if hops]
    return functools.reduce(jnp.add, sums, part(index))


def chunk(x: jax.Array, index: jax.Array, axis: str, dim: int) -> jax.Array:
    """The part of `x` along `dim` that belongs to the device of this index."""
    size = x.shape[dim] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, dim)


def join(chunks: Iterator[tuple[jax.Array, jax.Array]], axis: str, dim: int) -> jax.Array:
    """The chunks side by side along `dim` in the order of their indices."""
    whole = None
    for index, part in chunks:
        if whole is None:
            shape = (*part.shape[:dim], part.shape[dim] * jax.lax.axis_size(axis), *part.shape[dim + 1 :])
            whole = jnp.zeros(shape, part.dtype)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, index * part.shape[dim], dim)
    assert whole is not None
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Every device's `x`, side by side along `dim`."""
    return join(gathered(x, axis), axis, dim)


def _all_gather_forward(x: jax.Array, axis: str, dim: int) -> tuple[jax.Array, None]:
    return all_gather(x, axis, dim), None


def _all_gather_backward(axis: str, dim: int, _: None, dy: jax.Array) -> tuple[jax.Array]:
    return (scattered(lambda index: chunk(dy, index, axis, dim), axis),)


all_gather.defvjp(_all_gather_forward, _all_gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_matmul(x_BTd: jax.Array, weights: list[jax.Array], axis: str) -> list[jax.Array]:
    """`all_gather(x) @ w` for each w (D, K): (B, T, K). A chunk of x is multiplied while the next arrives."""
    ys: list[jax.Array] = []
    for index, x in gathered(x_BTd, axis):
        parts = [matmul("btd,dk->btk", x, chunk(w, index, axis, 0)) for w in weights]
        ys = [y + part for y, part in zip(ys, parts, strict=True)] if ys else parts
    return ys


def _gather_matmul_forward(x_BTd: jax.Array, weights: list[jax.Array], axis: str) -> tuple:
    return gather_matmul(x_BTd, weights, axis), (x_BTd, weights)


def _gather_matmul_backward(axis: str, saved: tuple, dys: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    x_BTd, weights = saved

    def dx(index: jax.Array) -> jax.Array:
        products = [matmul("btk,dk->btd", dy, chunk(w, index, axis, 0)) for dy, w in zip(dys, weights, strict=True)]
        return functools.reduce(jnp.add, products)

    arrived = list(gathered(x_BTd, axis))
    dws = [join(((index, matmul("btd,btk->dk", x, dy)) for index, x in arrived), axis, 0) for dy in dys]
    return scattered(dx, axis), dws


gather_matmul.defvjp(_gather_matmul_forward, _gather_matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_scatter(inputs: list[jax.Array], weights: list[jax.Array], axis: str) -> jax.Array:
    """The devices' sum of `x @ w` over pairs of x (B, T, K) and w (K, D), each device's d of D: (B, T, d).

    A chunk is multiplied while the sum of the previous one travels.
    """

    def part(index: jax.Array) -> jax.Array:
        pairs = zip(inputs, weights, strict=True)
        return functools.reduce(jnp.add, [matmul("btk,kd->btd", x, chunk(w, index, axis, 1)) for x, w in pairs])

    return scattered(part, axis)


def _matmul_scatter_forward(inputs: list[jax.Array], weights: list[jax.Array], axis: str) -> tuple:
    return matmul_scatter(inputs, weights, axis), (inputs, weights)


def _matmul_scatter_backward(axis: str, saved: tuple, dy_BTd: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    inputs, weights = saved
    arrived = list(gathered(dy_BTd, axis))
    dxs, dws = [], []
    for x, w in zip(inputs, weights, strict=True):
        products = [matmul("btd,kd->btk", dy, chunk(w, index, axis, 1)) for index, dy in arrived]
        dxs.append(functools.reduce(jnp.add, products))
        dws.append(join(((index, matmul("btk,btd->kd", x, dy)) for index, dy in arrived), axis, 1))
    return dxs, dws


matmul_scatter.defvjp(_matmul_scatter_forward, _matmul_scatter_backward)
