"""Self-attention of heads of 65 to 96 columns and 193 to 256 tokens, for Hopper; see `attention.py` for narrower heads.

A head's four matrices, in panels of 96 columns, fill shared memory. So hardly anything can be copied ahead to a second
place: what is used up is overwritten at once.

What orders accesses of shared memory: queries, which results overwrite, have two slots as in `attention.py`. Half of
the keys or values may be overwritten once its `free_barrier` says that all warpgroups have done with it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper, panels
from vit22b.kernels.attention_softmax import key_chunks, log_sum_exp, online_softmax, weighted_mean
from vit22b.kernels.hopper import BLOCK, LOG2_E
from vit22b.kernels.panels import PANELS, Matrix, turned

ROWS = 256  # of all matrices
BLOCKS = ROWS // BLOCK
HALF = ROWS // 2  # the CHUNK of `key_chunks`, so that no chunk lies in both halves


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    q_shared,
    half_shared,
    lse_shared,
    q_barrier,
    half_barrier,
    free_barrier,
    *,
    interpret: bool,
):
    """A warpgroup takes 64 queries of each head. Keys and values lie in halves: keys, values, keys, values. A half is
    overwritten with the next head's by the warpgroup of the same number.
    """
    batch, length, num_heads, head_dim = q_ref.shape
    outer_group = lax.axis_index("group")
    scale = LOG2_E / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    columns, terms = panels.sizes(head_dim)
    turns = lax.div(heads - 1 - first, step) + 1

    def load_queries(head, slot, group):
        place, barrier = hopper.place_of(head, num_heads), q_barrier.at[slot * BLOCKS + group]
        panels.load(q_ref, q_shared, place, BLOCK * group, BLOCK, slot, barrier, interpret)

    def load_half(head, half):
        place, ref = hopper.place_of(head, num_heads), (k_ref, v_ref)[half % 2]
        panels.load(ref, half_shared, place, HALF * (half // 2), HALF, half, half_barrier.at[half], interpret)

    load_queries(first, 0, outer_group)
    for half in range(4):
        pl.when(jnp.int32(outer_group) == half)(functools.partial(load_half, first, half))

    @pl.loop(0, turns)
    def _(turn):
        head, slot = first + turn * step, lax.rem(turn, jnp.int32(2))
        zero = hopper.opaque(turn)
        group = jnp.int32(outer_group) + zero
        more = head + step < heads

        def refill(half, head, condition):
            @pl.when((jnp.int32(outer_group) == half) & condition)
            def _():
                plgpu.barrier_wait(free_barrier.at[half])
                load_half(head, half)

        queries = Matrix(q_shared, slot, BLOCK * group, BLOCK, terms)
        plgpu.barrier_wait(q_barrier.at[slot * BLOCKS + group])
        chunks = key_chunks(length)
        top: Any = None
        total: Any = None
        out: Any = None
        for index, (start, keys) in enumerate(chunks):
            half = 2 * (start // HALF)
            row = start % HALF
            last_of_half = start + keys in (HALF, hopper.round_up(length, 8))

            def while_scoring(index=index):
                if index == 0:  # what the last head has used last
                    refill(3, head, turn > 0)
                elif index == 1:
                    refill(1, head + step, more)

            if not row:
                plgpu.barrier_wait(half_barrier.at[half])
            some_keys = Matrix(half_shared, half + zero, row + zero, keys, terms)
            (scores,) = panels.matmuls([(None, queries, turned(some_keys))], interpret, while_scoring)
            if last_of_half:
                plgpu.barrier_arrive(free_barrier.at[half])
            if start + keys > length:
                scores = hopper.masked(scores, length - start)
            if not start:

                @pl.when(more)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_queries(head + step, 1 - slot, group)

            weights, top, total, out = online_softmax(scores, scale, top, total, out)
            if not row:
                plgpu.barrier_wait(half_barrier.at[half + 1])
            weights = hopper.padded(weights.astype(jnp.bfloat16), hopper.round_up(keys, panels.STEP))
            values = Matrix(half_shared, half + 1 + zero, row + zero, weights.shape[1], columns)

            def while_adding(index=index):
                if index == 0:
                    refill(0, head + step, more)
                elif index == len(chunks) - 1:
                    refill(2, head + step, more)

            (out,) = panels.matmuls([(out, weights, values)], interpret, while_adding)
            if last_of_half:
                plgpu.barrier_arrive(free_barrier.at[half + 1])
        places = queries.places
        panels.write(places, weighted_mean(out, total))
        rows = pl.ds(BLOCK * group, BLOCK)
        lse_shared[slot, rows] = log_sum_exp(top, total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_shared.at[slot, rows], lse_ref.at[head, rows], commit_group=False)
        panels.store(out_ref, places, hopper.place_of(head, num_heads), BLOCK * group, interpret)

    plgpu.wait_smem_to_gmem(0)
    for half in range(4):  # the last ones that nobody waited for
        pl.when(jnp.int32(outer_group) == half)(functools.partial(plgpu.barrier_wait, free_barrier.at[half]))


@jax.jit  # as `attention.forward`
def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `attention.forward`, which calls this for wide heads."""
    batch, _, num_heads, _ = q.shape
    heads = batch * num_heads
    return hopper.call(
        _forward_kernel,
        "attention_wide_forward",
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, ROWS), jnp.float32)],
        [
            panels.shared(2, ROWS),
            panels.shared(4, HALF),
            plgpu.SMEM((2, ROWS), jnp.float32),
            hopper.barriers(2 * BLOCKS, PANELS),
            hopper.barriers(4, PANELS),
            hopper.barriers(4, BLOCKS),
        ],
        heads,
        BLOCKS,
    )(q, k, v)
