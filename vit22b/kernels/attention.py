"""Self-attention of short sequences, for Hopper.

At most 256 tokens: a head's keys and values fit into shared memory as a whole. So the softmax of a row is found in at
most three parts, and the backward pass adds up each gradient in registers, without atomics. This is for heads of up to
64 columns; see `attention_wide.py` for up to 96.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import attention_wide, attention_wide_backward, hopper, norms, panels
from vit22b.kernels.attention_backward import backward
from vit22b.kernels.attention_norm import KEY, QUERY, Norm, with_norm
from vit22b.kernels.attention_softmax import key_chunks, log_sum_exp, online_softmax, weighted_mean
from vit22b.kernels.hopper import BLOCK, LOG2_E

# The numbers of tokens, by head dim, with which the kernels were run on a GPU. They are written for more, and
# interpreted with more: for up to 256 tokens in heads of up to 64, and for 193 to 256 in heads of up to 96.
LENGTHS = {64: range(193, 257), 72: range(256, 257), 88: range(256, 257)}


def _wide(q: jax.Array) -> bool:
    return q.shape[-1] > hopper.WIDTH


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v per head, softmax in fp32, of bf16 arrays (B, T, N, H) on one device.

    For the backward pass it keeps its arguments, its result and a number per query and head.
    """
    return _attention_forward(q, k, v)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def normed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, query_scale: jax.Array, key_scale: jax.Array, epsilon: float
) -> jax.Array:
    """`attention` of queries and keys that are normalised first, as by `norms.norm` with scales, fp32 (H,).

    For heads of up to hopper.WIDTH columns. Normalised queries and keys are kept, too.
    """
    return _normed_attention_forward(q, k, v, query_scale, key_scale, epsilon)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = (attention_wide.forward if _wide(q) else forward)(q, k, v)
    return out, (q, k, v, out, lse)


def _attention_backward(kept: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = kept
    return tuple((attention_wide_backward.backward if _wide(q) else backward)(q, k, v, out, lse, grad))


def _normed_attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, query_scale: jax.Array, key_scale: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple]:
    scales = jnp.stack([query_scale, key_scale])
    out, lse, *normed = forward(q, k, v, scales, epsilon)
    return out, ((q, k), (query_scale, key_scale), (*normed, v, out, lse))


def _normed_attention_backward(epsilon: float, kept: tuple, grad: jax.Array) -> tuple[jax.Array, ...]:
    before, scales, after = kept
    *grads, grad_v = _attention_backward(after, grad)
    norm = functools.partial(norms.norm, bias=None, centred=False, epsilon=epsilon)
    pairs = [jax.vjp(norm, x, scale)[1](g) for x, scale, g in zip(before, scales, grads, strict=True)]
    (grad_q, grad_query_scale), (grad_k, grad_key_scale) = pairs
    return grad_q, grad_k, grad_v, grad_query_scale, grad_key_scale


attention.defvjp(_attention_forward, _attention_backward)
normed_attention.defvjp(_normed_attention_forward, _normed_attention_backward)


def fits(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> bool:
    """Whether `attention` takes queries of this shape (B, T, N, H), and runs under this JAX."""
    _, length, _, head_dim = shape
    available = hopper.AVAILABLE if head_dim <= hopper.WIDTH else panels.AVAILABLE
    return available and dtype == jnp.bfloat16 and length in LENGTHS.get(head_dim, ())


def fits_norms(shape: tuple[int, ...]) -> bool:
    """Whether `normed_attention` takes what `attention` takes. For wide heads it took longer than kernels apart."""
    return shape[-1] <= hopper.WIDTH


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    q_shared,
    k_shared,
    v_shared,
    lse_shared,
    q_barrier,
    k_barrier,
    v_barrier,
    free_barrier,
    *,
    norm: Norm | None,
    interpret: bool,
):
    """A warpgroup takes 64 queries of each head. The next head is meanwhile copied to the other slot.

    With a norm, it normalises its queries and as many keys there once it has done with a head, and `ready_barrier` says
    that all warpgroups have; whatever else orders accesses to keys is as without.
    """
    batch, length, num_heads, head_dim = q_ref.shape
    all_rows, key_rows = hopper.round_up(length, BLOCK), k_shared.shape[1]
    outer_group, groups = lax.axis_index("group"), lax.axis_size("group")
    scale = LOG2_E / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads

    def load_queries(head, slot, group, query):
        place, barrier = hopper.place_of(head, num_heads), q_barrier.at[slot * groups + group]
        hopper.load(q_ref, q_shared, place, query, BLOCK, slot, barrier, interpret)

    def load_rest(head, slot):
        place = hopper.place_of(head, num_heads)
        hopper.load(k_ref, k_shared, place, 0, key_rows, slot, k_barrier.at[slot], interpret)
        hopper.load(v_ref, v_shared, place, 0, all_rows, slot, v_barrier.at[slot], interpret)

    def normalise(norm, head, slot, group):
        query, place = BLOCK * group, hopper.place_of(head, num_heads)
        both = (q_shared, q_barrier.at[slot * groups + group]), (k_shared, k_barrier.at[slot])
        for which, (memory, barrier) in zip((QUERY, KEY), both, strict=True):
            rows = memory.at[slot, pl.ds(query, BLOCK)]
            plgpu.barrier_wait(barrier)
            rows[...] = norm.apply(hopper.read(rows, plgpu.Layout.WGMMA), which)
            plgpu.commit_smem()
            hopper.store(norm.results[which], memory, place, query, BLOCK, slot, interpret)
        plgpu.barrier_arrive(norm.ready_barrier.at[slot])

    load_queries(first, 0, outer_group, BLOCK * outer_group)
    pl.when(jnp.int32(outer_group) == 0)(lambda: load_rest(first, 0))
    if norm:
        normalise(norm, first, 0, outer_group)

    turns = lax.div(heads - 1 - first, step) + 1

    @pl.loop(0, turns)
    def _(turn):
        head, slot = first + turn * step, lax.rem(turn, jnp.int32(2))
        group = jnp.int32(outer_group) + hopper.opaque(turn)
        query = BLOCK * group
        queries = q_shared.at[slot, pl.ds(query, BLOCK)]
        if norm:
            plgpu.barrier_wait(norm.ready_barrier.at[slot])
        else:
            plgpu.barrier_wait(q_barrier.at[slot * groups + group])
            plgpu.barrier_wait(k_barrier.at[slot])

        top: Any = None
        total: Any = None
        out: Any = None
        for start, columns in key_chunks(length):
            some_keys = hopper.turned(k_shared.at[slot, pl.ds(start, columns)])
            (scores,) = hopper.matmuls([(None, queries, some_keys)], interpret)
            scores = hopper.masked(scores, length - start)
            if not start:
                # Before results take the places of queries, and others those of keys.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(head + step < heads)
                def _():
                    load_queries(head + step, 1 - slot, group, query)

                    @pl.when(jnp.int32(outer_group) == 0)
                    def _():
                        pl.when(turn > 0)(lambda: plgpu.barrier_wait(free_barrier.at[1 - slot]))
                        load_rest(head + step, 1 - slot)

            weights, top, total, out = online_softmax(scores, scale, top, total, out)
            if not start:
                plgpu.barrier_wait(v_barrier.at[slot])
            weights = hopper.padded(weights.astype(jnp.bfloat16), hopper.round_up(columns, BLOCK))
            values = v_shared.at[slot, pl.ds(start, weights.shape[1])]
            (out,) = hopper.matmuls([(out, weights, values)], interpret)
        plgpu.barrier_arrive(free_barrier.at[slot])
        queries[...] = weighted_mean(out, total)
        lse_shared[slot, pl.ds(query, BLOCK)] = log_sum_exp(top, total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            lse_shared.at[slot, pl.ds(query, BLOCK)], lse_ref.at[head, pl.ds(query, BLOCK)], commit_group=False
        )
        hopper.store(out_ref, q_shared, hopper.place_of(head, num_heads), query, BLOCK, slot, interpret)
        if norm:
            pl.when(head + step < heads)(lambda: normalise(norm, head + step, 1 - slot, group))

    plgpu.wait_smem_to_gmem(0)

    @pl.when(jnp.int32(outer_group) == 0)
    def _():
        # the last ones that nobody waited for
        plgpu.barrier_wait(free_barrier.at[lax.rem(turns - 1, jnp.int32(2))])
        pl.when(turns > 1)(lambda: plgpu.barrier_wait(free_barrier.at[lax.rem(turns, jnp.int32(2))]))


# Traced once for all layers: kernels are compiled, for seconds, once for all that are the same to the letter.
@functools.partial(jax.jit, static_argnames="epsilon")
def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scales: jax.Array | None = None, epsilon: float = 0.0
) -> list[jax.Array]:
    """Attention and, for `backward`, the base-2 logarithm of the sum of exponentials of scores, (B N, T rounded up).

    With `scales`, (2, H), of queries and keys that are normalised first; these are further results.
    """
    batch, length, num_heads, head_dim = q.shape
    keys, all_rows, heads = hopper.round_up(length, 8), hopper.round_up(length, BLOCK), batch * num_heads
    groups = all_rows // BLOCK
    kernel: Callable = functools.partial(_forward_kernel, norm=None)
    arrays, more_scratch = [q, k, v], []
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, all_rows), jnp.float32)]
    if scales is not None:
        keys = all_rows  # normalised in whole blocks
        kernel = with_norm(_forward_kernel, head_dim, epsilon)
        arrays.append(jnp.pad(scales, ((0, 0), (0, hopper.WIDTH - head_dim))))
        results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)]
        more_scratch.append(hopper.barriers(2, groups))
    return hopper.call(
        kernel,
        "attention_forward",
        results,
        [
            hopper.shared(2, all_rows),
            hopper.shared(2, keys),
            hopper.shared(2, all_rows),
            plgpu.SMEM((2, all_rows), jnp.float32),
            hopper.barriers(2 * groups, 1),
            hopper.barriers(2, 1),
            hopper.barriers(2, 1),
            hopper.barriers(2, groups),
            *more_scratch,
        ],
        heads,
        groups,
    )(*arrays)
