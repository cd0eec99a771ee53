"""Softmax and its gradients, as all attention kernels take them a step at a time.

All of it happens in registers of a warpgroup, in fp32 where nothing else is said. Exponentials and logarithms are to
base 2, as the hardware has them: `scale` is that of scores times log2(e).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper
from vit22b.kernels.hopper import LOG2_E

CHUNK = 128  # keys whose scores a warpgroup holds at once, first
LATER_CHUNK = 64  # and then, when it holds sums of values, too
FAR_BELOW = -1e30  # a score whose exponential is 0


def key_chunks(length: int) -> list[tuple[int, int]]:
    """Start and number of the keys whose scores are found at once in the forward pass."""
    keys = hopper.round_up(length, 8)
    chunks = [(0, min(CHUNK, keys))]
    while (start := sum(chunks[-1])) < keys:
        # A little more than LATER_CHUNK, rather than a chunk more.
        rest = keys - start
        chunks.append((start, rest if rest <= LATER_CHUNK + 8 else LATER_CHUNK))
    return chunks


def online_softmax(scores: jax.Array, scale: float, top: Any, total: Any, out: Any) -> tuple[jax.Array, Any, Any, Any]:
    """Weights of a chunk of keys, relative to the highest score so far, `top`; and what was found before relative to
    that, too: the sum of weights, with theirs, and the sum of weighted values, without. All three are None at first.
    """
    highest = scores.max(axis=1) * scale
    if top is not None:
        highest = jnp.maximum(top, highest)
        shrink = jnp.exp2(top - highest)
        total = total * shrink
        out = out * hopper.along_columns(shrink, out.shape)
    weights = jnp.exp2(scores * scale - hopper.along_columns(highest, scores.shape))
    part = weights.sum(axis=1)
    return weights, highest, part if top is None else total + part, out


def weighted_mean(out: jax.Array, total: jax.Array) -> jax.Array:
    """The sum of weighted values over that of weights, bf16."""
    inverse = 1 / total
    return (out * hopper.along_columns(inverse, out.shape)).astype(jnp.bfloat16)


def log_sum_exp(top: jax.Array, total: jax.Array) -> jax.Array:
    return top + jnp.log(total) * LOG2_E


def key_bias(shape: tuple[int, int], keys: int) -> jax.Array:
    """What transposed scores start at, to be masked: 0, and from row `keys` on, where no keys are, far below."""
    places = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(places < keys, jnp.float32(0), jnp.float32(FAR_BELOW))


def recomputed_weights(scores: jax.Array, scale: float, lse_ref: Any) -> jax.Array:
    """Softmax of transposed scores, bf16, by what `log_sum_exp` has found of their columns in the forward pass."""
    lse = hopper.read(lse_ref, plgpu.Layout.WGMMA.reduce(0))
    weights = jnp.exp2(scores * scale - hopper.along_rows(lse, scores.shape))
    # Rounded in pairs: without the barrier the compiler rounds one by one where both forms are used.
    return lax.optimization_barrier(weights.astype(jnp.bfloat16))


def score_gradients(weights: jax.Array, products: jax.Array, delta: jax.Array) -> jax.Array:
    """The gradients of transposed scores before their scale, bf16.

    Of weights, of the products of values and gradients of outputs, and, per column, of those of outputs themselves.
    """
    ds = weights.astype(jnp.float32) * (products - hopper.along_rows(delta, products.shape))
    return ds.astype(jnp.bfloat16)
