"""The backward pass of vit22b/kernels/attention.py: all three gradients in one kernel, with five matmuls per pair of
blocks.

What orders accesses of shared memory: a block's queries, results and gradients may be overwritten once `full_barrier`
says that all warpgroups have done with that block; gradients of scores once `free_barrier` says that the gradient of
the last block's queries is found; keys of the slot not in use once their gradients, which lie there, are copied.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper
from vit22b.kernels.attention_softmax import key_bias, recomputed_weights, score_gradients
from vit22b.kernels.hopper import BLOCK, LOG2_E

GROUPS = (0, 1, 2, 3, 2)  # warpgroups for each number of blocks of keys: 4 would want for registers


def _kernel(*refs, interpret: bool):
    """A program for each warpgroup, that knows its blocks of keys when it is compiled."""
    for group in range(lax.axis_size("group")):
        run = functools.partial(_group, *refs, group=group, interpret=interpret)
        pl.when(lax.axis_index("group") == group)(run)


def _group(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    grad_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    q_shared,
    k_shared,
    v_shared,
    out_shared,
    grad_shared,
    ds_shared,
    lse_shared,
    delta_shared,
    q_barrier,
    k_barrier,
    v_barrier,
    out_barrier,
    grad_barrier,
    delta_barrier,
    full_barrier,
    free_barrier,
    *,
    group: int,
    interpret: bool,
):
    """A warpgroup takes some blocks of 64 keys of each head and goes through all queries, 64 at a time; scores lie
    transposed.

    It adds up its part of the gradients of keys and values in registers. Gradients of scores go to shared memory, where
    for each block of queries one warpgroup, its owner, multiplies them with all keys. The owner also copies those
    queries, outputs and their gradients, and takes the sums of products of the latter two (`delta`).
    """
    batch, length, num_heads, head_dim = q_ref.shape
    all_rows = hopper.round_up(length, BLOCK)
    blocks, groups = all_rows // BLOCK, lax.axis_size("group")
    each, last_block = blocks // groups, blocks - 1
    scale = LOG2_E / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    own = [group * each + index for index in range(each)]
    turns = lax.div(heads - 1 - first, step) + 1
    rest = length - BLOCK * last_block  # queries of the last block
    narrow = hopper.round_up(rest, 16) if blocks > 1 and rest <= 32 else BLOCK

    def rows(block):
        return pl.ds(BLOCK * block, BLOCK)

    def owner(block):
        return jnp.int32(group) == lax.div(jnp.int32(block), jnp.int32(each))

    def load(ref, memory, barrier, head, block, slot=0):
        hopper.load(ref, memory, hopper.place_of(head, num_heads), BLOCK * block, BLOCK, slot, barrier, interpret)

    def load_keys(head, slot):
        for block in own:
            load(k_ref, k_shared, k_barrier.at[slot], head, block, slot)

    def load_queries(head, block):
        load(q_ref, q_shared, q_barrier.at[block], head, block)
        plgpu.copy_gmem_to_smem(lse_ref.at[head, rows(block)], lse_shared.at[rows(block)], q_barrier.at[block])
        load(grad_ref, grad_shared, grad_barrier.at[block], head, block)

    def load_values(head):
        for block in own:
            load(v_ref, v_shared, v_barrier.at[group], head, block)

    def load_out(head, block):
        load(out_ref, out_shared, out_barrier.at[block], head, block)

    def store(ref, memory, head, block, slot=0):
        hopper.store(ref, memory, hopper.place_of(head, num_heads), BLOCK * block, BLOCK, slot, interpret)

    load_keys(first, 0)
    for block in own:
        load_queries(first, block)
    load_values(first)
    for block in own:
        load_out(first, block)

    def find_delta(block):
        plgpu.barrier_wait(out_barrier.at[block])
        plgpu.barrier_wait(grad_barrier.at[block])
        out, grad = (
            hopper.read(memory.at[0, rows(block)], plgpu.Layout.WGMMA).astype(jnp.float32)
            for memory in (out_shared, grad_shared)
        )
        delta_shared[rows(block)] = (out * grad).sum(axis=1)
        plgpu.barrier_arrive(delta_barrier.at[block])

    def start_of_scores(index):
        """0, for keys that do not exist far below."""
        if all_rows == length or index != each - 1:
            return hopper.zeros((BLOCK, BLOCK), jnp.float32)
        return key_bias((BLOCK, BLOCK), length - BLOCK * own[index])

    @pl.loop(0, turns)
    def _(turn):
        head, slot = first + turn * step, lax.rem(turn, jnp.int32(2))
        more = head + step < heads
        pl.when(jnp.int32(group) == 0)(lambda: find_delta(0))
        plgpu.barrier_wait(k_barrier.at[slot])

        def add(block, sums, width, final):
            """`width` queries of a block; `final`: the last one, on its own."""
            dks, dvs = list(sums[0]), list(sums[1])
            zero = hopper.opaque(turn + jnp.int32(block))
            key_blocks = [jnp.int32(x) + hopper.opaque(turn + jnp.int32(block)) for x in own]
            columns = pl.ds(BLOCK * block, width)
            queries, grads = q_shared.at[zero, rows(block)], grad_shared.at[zero, rows(block)]
            plgpu.barrier_wait(q_barrier.at[block])
            for index, key_block in enumerate(key_blocks):
                values = v_shared.at[zero, rows(key_block)]
                last = index == each - 1
                start = start_of_scores(index)
                if width != BLOCK:
                    start = start[:, :width]
                keys, thin = k_shared.at[slot + zero, rows(key_block)], hopper.turned(q_shared.at[zero, columns])
                (scores,) = hopper.matmuls([(start, keys, thin)], interpret)
                weights = recomputed_weights(scores, scale, lse_shared.at[columns])
                if not index:
                    pl.when(jnp.logical_not(owner(block)))(lambda: plgpu.barrier_wait(grad_barrier.at[block]))
                    pl.when(jnp.int32(block) == 0)(lambda: plgpu.barrier_wait(v_barrier.at[group]))

                def delta_ready(index=index):
                    if not index:
                        if not final:
                            pl.when(owner(block + 1) & (block + 1 < blocks))(lambda: find_delta(block + 1))
                        plgpu.barrier_wait(delta_barrier.at[block])

                def share(ds, index=index, key_block=key_block, last=last):
                    if not index:
                        pl.when(jnp.int32(block) > 0)(lambda: plgpu.barrier_wait(free_barrier))

                        @pl.when(jnp.int32(block) == 0)
                        def _():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            pl.when(more)(lambda: load_keys(head + step, 1 - slot))

                    ds_shared[zero, rows(key_block)] = ds
                    if last:
                        plgpu.commit_smem()  # after which all warps have used the values
                        pl.when((jnp.int32(block) == last_block) & more)(lambda: load_values(head + step))

                product = (None, values, hopper.turned(grad_shared.at[zero, columns]))
                dv = (dvs[index], hopper.padded(weights, BLOCK), grads)
                products, dvs[index] = hopper.matmuls([product, dv], interpret, delta_ready)
                delta = hopper.read(delta_shared.at[columns], plgpu.Layout.WGMMA.reduce(0))
                ds = hopper.padded(score_gradients(weights, products, delta), BLOCK)
                (dks[index],) = hopper.matmuls(
                    [(dks[index], ds, queries)], interpret, lambda ds=ds, share=share: share(ds)
                )
            if blocks > 1:

                @pl.when((jnp.int32(block) > 0) & more & owner(jnp.maximum(jnp.int32(block) - 1, 0)))
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_out(head + step, block - 1)

            plgpu.barrier_arrive(full_barrier.at[block])

            @pl.when(owner(block))
            def _():
                plgpu.barrier_wait(full_barrier.at[block])
                pl.when(more)(lambda: load_queries(head + step, block))
                left = hopper.turned(ds_shared.at[zero])
                (dq,) = hopper.matmuls([(None, left, k_shared.at[slot + zero])], interpret)
                plgpu.barrier_arrive(free_barrier)
                out_shared[zero, rows(block)] = (dq * (1 / math.sqrt(head_dim))).astype(jnp.bfloat16)
                plgpu.commit_smem()
                store(dq_ref, out_shared, head, block)

            return dks, dvs

        zeros = [hopper.zeros((BLOCK, hopper.WIDTH), jnp.float32) for _ in own]
        peeled = narrow != BLOCK
        sums = lax.fori_loop(0, blocks - peeled, lambda block, sums: add(block, sums, BLOCK, False), (zeros, zeros))
        if peeled:
            sums = add(last_block, sums, narrow, True)
        plgpu.barrier_wait(free_barrier)
        for block, dk, dv in zip(own, *sums, strict=True):  # where nothing has to be loaded soon
            k_shared[slot, rows(block)] = dv.astype(jnp.bfloat16)
            ds_shared[0, rows(block)] = (dk * (1 / math.sqrt(head_dim))).astype(jnp.bfloat16)
        plgpu.commit_smem()

        @pl.when(owner(last_block) & more)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load_out(head + step, last_block)

        for block in own:
            store(dv_ref, k_shared, head, block, slot)
            store(dk_ref, ds_shared, head, block)

    plgpu.wait_smem_to_gmem(0)


@jax.jit  # as `attention.forward`
def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, grad: jax.Array
) -> list[jax.Array]:
    """Gradients of q, k and v, all bf16 (B, T, N, H); `lse` is that of `attention.forward`."""
    batch, length, num_heads, _ = q.shape
    all_rows, heads = hopper.round_up(length, BLOCK), batch * num_heads
    blocks = all_rows // BLOCK
    groups = GROUPS[blocks]
    vector = plgpu.SMEM((all_rows,), jnp.float32)
    return hopper.call(
        _kernel,
        "attention_backward",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        [
            hopper.shared(1, all_rows),
            hopper.shared(2, all_rows),
            hopper.shared(1, all_rows),
            hopper.shared(1, all_rows),
            hopper.shared(1, all_rows),
            hopper.shared(1, all_rows),
            vector,
            vector,
            hopper.barriers(blocks, 2),
            hopper.barriers(2, blocks),
            hopper.barriers(groups, blocks // groups),
            hopper.barriers(blocks, 1),
            hopper.barriers(blocks, 1),
            hopper.barriers(blocks, 1),
            hopper.barriers(blocks, groups),
            plgpu.Barrier(),
        ],
        heads,
        groups,
    )(q, k, v, out, lse, grad)
