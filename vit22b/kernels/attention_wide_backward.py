"""The backward pass of vit22b/kernels/attention_wide.py, as `attention_backward.py` for narrower heads.

What orders accesses of shared memory: a block's queries, gradients and `lse` may be overwritten once `full_barrier`
says that both warpgroups have done with that block. Its queries are, by their own gradients, and only once those are
copied by the next head's. `delta` may be overwritten once `grad_barrier` says that the block's next gradients are
there, which took the place of used ones. (Where lengths are no multiple of 64, some of the last but one block's `delta`
is then written again, with the same values.) Gradients of scores may be overwritten once `free_barrier` says that the
gradient of the last block's queries is found; after the last block that means that both warpgroups have done with
everything. Then the next head's keys are copied at once, as all wait for them; gradients of keys take the places of
those of scores and of the last two blocks of `grad`. Values are used by their warpgroup alone; they are overwritten, by
their own gradients, after the barrier of that warpgroup within the last `share`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper, panels
from vit22b.kernels.attention_softmax import key_bias, recomputed_weights, score_gradients
from vit22b.kernels.attention_wide import BLOCKS, ROWS
from vit22b.kernels.hopper import BLOCK, LOG2_E
from vit22b.kernels.panels import PANELS, Matrix, Place, turned

# For heads of up to so many columns, what a warpgroup takes at once, where its gradients of keys and values fill most
# of its registers: queries, and columns of their gradients.
AT_ONCE = {72: (64, 96), 96: (32, 64)}
REGISTERS = (240, 24)  # of threads that multiply, and of the others


class Refs(NamedTuple):
    """Of a program: arrays in device memory, then what lies in shared memory, and barriers."""

    q_ref: Any
    k_ref: Any
    v_ref: Any
    out_ref: Any
    lse_ref: Any
    grad_ref: Any
    dq_ref: Any
    dk_ref: Any
    dv_ref: Any
    q_shared: Any
    k_shared: Any
    v_shared: Any
    grad_shared: Any
    ds_shared: Any
    lse_shared: Any
    delta_shared: Any
    q_barrier: Any
    k_barrier: Any
    v_barrier: Any
    grad_barrier: Any
    delta_barrier: Any
    full_barrier: Any
    free_barrier: Any


def _backward_kernel(*all_refs, interpret: bool):
    """A program for each warpgroup, that knows its blocks of keys when it is compiled."""
    refs = Refs(*all_refs)
    for group in range(2):
        pl.when(lax.axis_index("group") == group)(functools.partial(_multiply, refs, group, interpret))
    pl.when(lax.axis_index("group") == 2)(functools.partial(_find_delta, refs, interpret))


def _find_delta(refs: Refs, interpret: bool) -> None:
    """The third warpgroup: takes the sums of products of outputs and their gradients, `delta`, up to a head ahead.

    Outputs come from device memory, as there is no room for them in shared memory.
    """
    batch, length, num_heads, head_dim = refs.q_ref.shape
    if not interpret:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    turns = lax.div(heads - 1 - first, step) + 1
    refs.delta_shared[...] = jnp.zeros((ROWS,), jnp.float32)  # for rows beyond the last one
    plgpu.commit_smem()  # other threads will write them

    @pl.loop(0, turns * BLOCKS)
    def _(index):
        turn, block = lax.div(index, jnp.int32(BLOCKS)), lax.rem(index, jnp.int32(BLOCKS))
        image, head = hopper.place_of(first + turn * step, num_heads)
        if not interpret:

            @pl.when((block == 0) & (turn + 1 < turns))
            def _():  # into the L2 cache
                next_image, next_head = hopper.place_of(first + (turn + 1) * step, num_heads)
                plgpu.async_prefetch(refs.out_ref.at[next_image, pl.ds(0, length), next_head, pl.ds(0, head_dim)])

        start = jnp.minimum(BLOCK * block, length - BLOCK)  # some rows twice, rather than rows beyond the last one

        def from_device(ref, column, columns):
            part = ref.at[image, pl.ds(start, BLOCK), head, pl.ds(column, columns)]
            whole = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)  # type: ignore[call-arg]  # as in hopper
            return whole.astype(jnp.float32)

        delta = 0
        for panel in range(PANELS):
            column = panels.PANEL * panel
            columns = min(panels.PANEL, head_dim - column)
            out = from_device(refs.out_ref, column, columns)
            if not panel:  # when the last head's `delta` is used, too
                plgpu.barrier_wait(refs.grad_barrier.at[block])
            if length == ROWS:
                grad = hopper.read(Place(refs.grad_shared, 0, panel, BLOCK * block, BLOCK).ref, plgpu.Layout.WGMMA)
                grad = grad[:, :columns].astype(jnp.float32)
            else:
                grad = from_device(refs.grad_ref, column, columns)
            delta = delta + (out * grad).sum(axis=1)
        refs.delta_shared[pl.ds(start, BLOCK)] = delta
        plgpu.barrier_arrive(refs.delta_barrier.at[block])


def _multiply(refs: Refs, group: int, interpret: bool) -> None:
    """The first two warpgroups: each takes two blocks of 64 keys of each head and goes through all queries, as
    `attention_backward._group` does.
    """
    batch, length, num_heads, head_dim = refs.q_ref.shape
    if not interpret:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
    scale, unscale = LOG2_E / math.sqrt(head_dim), 1 / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    turns = lax.div(heads - 1 - first, step) + 1
    columns, terms = panels.sizes(head_dim)
    width, some_columns = next(sizes for limit, sizes in AT_ONCE.items() if head_dim <= limit)
    own = [2 * group, 2 * group + 1]
    last_grad = 2 + group  # the block whose place holds gradients of keys, at last
    pieces = [(start, min(some_columns, columns - start)) for start in range(0, columns, some_columns)]

    def rows(block):
        return pl.ds(BLOCK * block, BLOCK)

    def owner(block):
        return jnp.int32(group) == lax.div(jnp.int32(block), jnp.int32(2))

    def load(ref, memory, barrier, head, block):
        panels.load(ref, memory, hopper.place_of(head, num_heads), BLOCK * block, BLOCK, 0, barrier, interpret)

    def store(ref, places, head, block):
        panels.store(ref, places, hopper.place_of(head, num_heads), BLOCK * block, interpret)

    def load_queries(head, block):
        load(refs.q_ref, refs.q_shared, refs.q_barrier.at[block], head, block)
        lse, place = refs.lse_ref.at[head, rows(block)], refs.lse_shared.at[rows(block)]
        plgpu.copy_gmem_to_smem(lse, place, refs.q_barrier.at[block])

    def load_grad(head, block):
        load(refs.grad_ref, refs.grad_shared, refs.grad_barrier.at[block], head, block)

    def load_keys(head):
        for block in own:
            load(refs.k_ref, refs.k_shared, refs.k_barrier, head, block)

    def load_values(head):
        for block in own:
            load(refs.v_ref, refs.v_shared, refs.v_barrier.at[group], head, block)

    load_keys(first)
    for block in own:
        load_queries(first, block)
    load_values(first)
    for block in own:
        load_grad(first, block)

    def start_of_scores(index):
        """0, for keys that do not exist far below."""
        if length == ROWS or own[index] != BLOCKS - 1:
            return hopper.zeros((BLOCK, width), jnp.float32)
        return key_bias((BLOCK, width), length - BLOCK * own[index])

    @pl.loop(0, turns)
    def _(turn):
        head = first + turn * step
        more = head + step < heads
        plgpu.barrier_wait(refs.k_barrier)

        def add(block, sums):
            """A block of queries."""
            dks, dvs = list(sums[0]), list(sums[1])
            plgpu.barrier_wait(refs.q_barrier.at[block])
            for part in range(BLOCK // width):
                for index in range(2):
                    first_step = not part and not index
                    zero = hopper.opaque(turn + block + part + index)
                    key_row, query_row = BLOCK * (own[index] + zero), BLOCK * (block + zero) + width * part
                    some = pl.ds(query_row, width)
                    keys = Matrix(refs.k_shared, zero, key_row, BLOCK, terms)
                    values = Matrix(refs.v_shared, zero, key_row, BLOCK, terms)
                    queries = Matrix(refs.q_shared, zero, query_row, width, columns)
                    grads = Matrix(refs.grad_shared, zero, query_row, width, columns)
                    wide_queries, wide_grads = queries._replace(columns=terms), grads._replace(columns=terms)
                    (scores,) = panels.matmuls([(start_of_scores(index), keys, turned(wide_queries))], interpret)
                    weights = recomputed_weights(scores, scale, refs.lse_shared.at[some])
                    if first_step:
                        plgpu.barrier_wait(refs.grad_barrier.at[block])
                        pl.when(block == 0)(lambda: plgpu.barrier_wait(refs.v_barrier.at[group]))

                    def delta_ready(first_step=first_step):
                        if first_step:
                            plgpu.barrier_wait(refs.delta_barrier.at[block])

                    def share(ds, part=part, index=index, first_step=first_step, zero=zero, key_row=key_row):
                        if first_step:

                            @pl.when(block > 0)
                            def _():
                                plgpu.barrier_wait(refs.free_barrier)

                                @pl.when(owner(jnp.maximum(block - 1, 0)) & more)
                                def _():
                                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                                    load_queries(head + step, block - 1)

                        for panel in range(width // panels.PANEL):
                            place = part * width // panels.PANEL + panel
                            piece = ds[:, panels.PANEL * panel : panels.PANEL * (panel + 1)]
                            refs.ds_shared[zero, place, pl.ds(key_row, BLOCK)] = piece
                        if index:
                            plgpu.commit_smem()  # after which all warps have used the values

                    products, dvs[index] = panels.matmuls(
                        [(None, values, turned(wide_grads)), (dvs[index], weights, grads)], interpret, delta_ready
                    )
                    delta = hopper.read(refs.delta_shared.at[some], plgpu.Layout.WGMMA.reduce(0))
                    # Unpacked here: the compiler would do it before the matmul, and keep both forms.
                    ds = score_gradients(lax.optimization_barrier(weights), products, delta)
                    (dks[index],) = panels.matmuls(
                        [(dks[index], ds, queries)], interpret, lambda ds=ds, share=share: share(ds)
                    )
            plgpu.barrier_arrive(refs.full_barrier.at[block])

            @pl.when(owner(block))
            def _():
                plgpu.barrier_wait(refs.full_barrier.at[block])
                pl.when(more & (block < 2))(lambda: load_grad(head + step, block))
                zero = hopper.opaque(turn + block)
                left = turned(Matrix(refs.ds_shared, zero, BLOCK * zero, ROWS, BLOCK))
                for start, size in pieces:
                    right = Matrix(refs.k_shared, zero, BLOCK * zero, ROWS, size, start // panels.PANEL)
                    (dq,) = panels.matmuls([(None, left, right)], interpret)
                    if start + size == columns:
                        plgpu.barrier_arrive(refs.free_barrier)
                    places = Matrix(refs.q_shared, zero, BLOCK * block, BLOCK, size, start // panels.PANEL).places
                    panels.write(places, (dq * unscale).astype(jnp.bfloat16))
                plgpu.commit_smem()
                store(refs.dq_ref, Matrix(refs.q_shared, zero, BLOCK * block, BLOCK, columns).places, head, block)

            return dks, dvs

        zeros = [hopper.zeros((BLOCK, columns), jnp.float32) for _ in own]
        dks, dvs = lax.fori_loop(0, BLOCKS, add, (zeros, zeros))

        def stage(ref, sums, places):
            for total, where in zip(sums, places, strict=True):
                panels.write(where, total.astype(jnp.bfloat16))
            plgpu.commit_smem()
            for block, where in zip(own, places, strict=True):
                store(ref, where, head, block)

        stage(refs.dv_ref, dvs, [Matrix(refs.v_shared, 0, BLOCK * block, BLOCK, columns).places for block in own])
        plgpu.barrier_wait(refs.free_barrier)
        pl.when(more)(lambda: load_keys(head + step))
        rest = Matrix(refs.grad_shared, 0, BLOCK * last_grad, BLOCK, columns).places
        pieces_of_ds = [Place(refs.ds_shared, 0, panel, BLOCK * block, BLOCK) for panel in range(2) for block in own]
        stage(refs.dk_ref, [dk * unscale for dk in dks], [pieces_of_ds[:PANELS], rest])
        # Before the next head's gradients of scores, too.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(more)
        def _():
            load_values(head + step)
            load_grad(head + step, last_grad)
            pl.when(owner(BLOCKS - 1))(lambda: load_queries(head + step, BLOCKS - 1))

    plgpu.wait_smem_to_gmem(0)


@jax.jit  # as `attention.forward`
def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, grad: jax.Array
) -> list[jax.Array]:
    """As `attention_backward.backward`."""
    batch, _, num_heads, _ = q.shape
    heads = batch * num_heads
    vector = plgpu.SMEM((ROWS,), jnp.float32)
    return hopper.call(
        _backward_kernel,
        "attention_wide_backward",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        [
            panels.shared(1, ROWS),
            panels.shared(1, ROWS),
            panels.shared(1, ROWS),
            panels.shared(1, ROWS),
            panels.shared(1, ROWS, BLOCK // panels.PANEL),
            vector,
            vector,
            hopper.barriers(BLOCKS, PANELS + 1),
            plgpu.Barrier(num_arrivals=BLOCKS * PANELS),
            hopper.barriers(2, 2 * PANELS),
            hopper.barriers(BLOCKS, PANELS),
            hopper.barriers(BLOCKS, 1),
            hopper.barriers(BLOCKS, 2),
            plgpu.Barrier(),
        ],
        heads,
        3,
    )(q, k, v, out, lse, grad)
