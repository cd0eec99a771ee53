"""Self-attention of heads of 65 to 96 columns and 193 to 256 tokens, for Hopper; see `attention.py` for narrower heads.

A head's four matrices, in panels of 96 columns, fill shared memory. So hardly anything can be copied ahead to a second
place: what is used up is overwritten at once.

What orders accesses of shared memory in the forward pass: queries, which results overwrite, have two slots as in
`attention.py`. Half of the keys or values may be overwritten once its `free_barrier` says that all warpgroups have
done with it.

In the backward pass: a block's queries, gradients and `lse` may be overwritten once `full_barrier` says that both
warpgroups have done with that block. Its queries are, by their own gradients, and only once those are copied by the
next head's. `delta` may be overwritten once `grad_barrier` says that the block's next gradients are there, which took
the place of used ones. (Where lengths are no multiple of 64, some of the last but one block's `delta` is then written
again, with the same values.) Gradients of scores may be overwritten once `free_barrier` says that the gradient of the
last block's queries is found; after the last block that means that both warpgroups have done with everything. Then the
next head's keys are copied at once, as all wait for them; gradients of keys take the places of those of scores and of
the last two blocks of `grad`. Values are used by their warpgroup alone; they are overwritten, by their own gradients,
after the barrier of that warpgroup within the last `share`.
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
from vit22b.kernels.hopper import BLOCK, LOG2_E
from vit22b.kernels.panels import PANELS, Matrix, Place, turned

ROWS = 256  # of all matrices
BLOCKS = ROWS // BLOCK
HALF = ROWS // 2
FAR_BELOW = -1e30  # a score whose exponential is 0
COLUMN_UNIT = 8  # results have a multiple of so many columns
# For heads of up to so many columns, what a warpgroup takes at once in the backward pass, where its gradients of keys
# and values fill most of its registers: queries, and columns of their gradients.
AT_ONCE = {72: (64, 96), 96: (32, 64)}
REGISTERS = (240, 24)  # of threads of the backward pass that multiply, and of the others


def _sizes(head_dim: int) -> tuple[int, int]:
    """Columns of results, and of operands to sum over."""
    return hopper.round_up(head_dim, COLUMN_UNIT), hopper.round_up(head_dim, panels.STEP)


def _pieces(columns: int, most: int) -> list[tuple[int, int]]:
    return [(start, min(most, columns - start)) for start in range(0, columns, most)]


def _chunks(length: int) -> list[tuple[int, int]]:
    """Start and number of the keys whose scores are found at once: a warpgroup later holds sums of values, too."""
    keys = hopper.round_up(length, 8) - HALF
    return [(0, HALF), (HALF, keys)] if keys <= BLOCK + 8 else [(0, HALF), (HALF, BLOCK), (HALF + BLOCK, keys - BLOCK)]


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
    columns, terms = _sizes(head_dim)
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
        chunks = _chunks(length)
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

            highest = scores.max(axis=1) * scale
            if start:
                highest = jnp.maximum(top, highest)
                shrink = jnp.exp2(top - highest)
                total = total * shrink
                out = out * hopper.along_columns(shrink, out.shape)
            top = highest
            weights = jnp.exp2(scores * scale - hopper.along_columns(top, scores.shape))
            part = weights.sum(axis=1)
            total = total + part if start else part
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
        inverse = 1 / total
        places = queries.places
        panels.write(places, (out * hopper.along_columns(inverse, out.shape)).astype(jnp.bfloat16))
        rows = pl.ds(BLOCK * group, BLOCK)
        lse_shared[slot, rows] = top + jnp.log(total) * LOG2_E
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


def _backward_kernel(*refs, interpret: bool):
    """A program for each warpgroup, that knows its blocks of keys when it is compiled."""
    for group in range(2):
        run = functools.partial(_multiply, *refs, group=group, interpret=interpret)
        pl.when(lax.axis_index("group") == group)(run)
    pl.when(lax.axis_index("group") == 2)(functools.partial(_find_delta, *refs, interpret=interpret))


def _find_delta(
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
    grad_shared,
    ds_shared,
    lse_shared,
    delta_shared,
    q_barrier,
    k_barrier,
    v_barrier,
    grad_barrier,
    delta_barrier,
    full_barrier,
    free_barrier,
    *,
    interpret: bool,
):
    """The third warpgroup: takes the sums of products of outputs and their gradients, `delta`, up to a head ahead.

    Outputs come from device memory, as there is no room for them in shared memory.
    """
    batch, length, num_heads, head_dim = q_ref.shape
    if not interpret:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    turns = lax.div(heads - 1 - first, step) + 1
    delta_shared[...] = jnp.zeros((ROWS,), jnp.float32)  # for rows beyond the last one
    plgpu.commit_smem()  # other threads will write them

    @pl.loop(0, turns * BLOCKS)
    def _(index):
        turn, block = lax.div(index, jnp.int32(BLOCKS)), lax.rem(index, jnp.int32(BLOCKS))
        image, head = hopper.place_of(first + turn * step, num_heads)
        if not interpret:

            @pl.when((block == 0) & (turn + 1 < turns))
            def _():  # into the L2 cache
                next_image, next_head = hopper.place_of(first + (turn + 1) * step, num_heads)
                plgpu.async_prefetch(out_ref.at[next_image, pl.ds(0, length), next_head, pl.ds(0, head_dim)])

        start = jnp.minimum(BLOCK * block, length - BLOCK)  # some rows twice, rather than rows beyond the last one

        def from_device(ref, column, columns):
            part = ref.at[image, pl.ds(start, BLOCK), head, pl.ds(column, columns)]
            whole = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)  # type: ignore[call-arg]  # as in hopper
            return whole.astype(jnp.float32)

        delta = 0
        for panel in range(PANELS):
            column = panels.PANEL * panel
            columns = min(panels.PANEL, head_dim - column)
            out = from_device(out_ref, column, columns)
            if not panel:  # when the last head's `delta` is used, too
                plgpu.barrier_wait(grad_barrier.at[block])
            if length == ROWS:
                grad = hopper.read(Place(grad_shared, 0, panel, BLOCK * block, BLOCK).ref, plgpu.Layout.WGMMA)
                grad = grad[:, :columns].astype(jnp.float32)
            else:
                grad = from_device(grad_ref, column, columns)
            delta = delta + (out * grad).sum(axis=1)
        delta_shared[pl.ds(start, BLOCK)] = delta
        plgpu.barrier_arrive(delta_barrier.at[block])


def _multiply(
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
    grad_shared,
    ds_shared,
    lse_shared,
    delta_shared,
    q_barrier,
    k_barrier,
    v_barrier,
    grad_barrier,
    delta_barrier,
    full_barrier,
    free_barrier,
    *,
    group: int,
    interpret: bool,
):
    """The first two warpgroups: each takes two blocks of 64 keys of each head and goes through all queries, as
    `attention_backward._group` does.
    """
    batch, length, num_heads, head_dim = q_ref.shape
    if not interpret:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
    scale, unscale = LOG2_E / math.sqrt(head_dim), 1 / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    turns = lax.div(heads - 1 - first, step) + 1
    columns, terms = _sizes(head_dim)
    width, some_columns = next(sizes for limit, sizes in AT_ONCE.items() if head_dim <= limit)
    own = [2 * group, 2 * group + 1]
    last_grad = 2 + group  # the block whose place holds gradients of keys, at last
    pieces = _pieces(columns, some_columns)

    def rows(block):
        return pl.ds(BLOCK * block, BLOCK)

    def owner(block):
        return jnp.int32(group) == lax.div(jnp.int32(block), jnp.int32(2))

    def load(ref, memory, barrier, head, block):
        panels.load(ref, memory, hopper.place_of(head, num_heads), BLOCK * block, BLOCK, 0, barrier, interpret)

    def store(ref, places, head, block):
        panels.store(ref, places, hopper.place_of(head, num_heads), BLOCK * block, interpret)

    def load_queries(head, block):
        load(q_ref, q_shared, q_barrier.at[block], head, block)
        plgpu.copy_gmem_to_smem(lse_ref.at[head, rows(block)], lse_shared.at[rows(block)], q_barrier.at[block])

    def load_grad(head, block):
        load(grad_ref, grad_shared, grad_barrier.at[block], head, block)

    def load_keys(head):
        for block in own:
            load(k_ref, k_shared, k_barrier, head, block)

    def load_values(head):
        for block in own:
            load(v_ref, v_shared, v_barrier.at[group], head, block)

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
        places = plgpu.broadcasted_iota(jnp.int32, (BLOCK, width), 0, layout=plgpu.Layout.WGMMA)
        return jnp.where(places < length - BLOCK * own[index], jnp.float32(0), jnp.float32(FAR_BELOW))

    @pl.loop(0, turns)
    def _(turn):
        head = first + turn * step
        more = head + step < heads
        plgpu.barrier_wait(k_barrier)

        def add(block, sums):
            """A block of queries."""
            dks, dvs = list(sums[0]), list(sums[1])
            plgpu.barrier_wait(q_barrier.at[block])
            for part in range(BLOCK // width):
                for index in range(2):
                    first_step = not part and not index
                    zero = hopper.opaque(turn + block + part + index)
                    key_row, query_row = BLOCK * (own[index] + zero), BLOCK * (block + zero) + width * part
                    some = pl.ds(query_row, width)
                    keys = Matrix(k_shared, zero, key_row, BLOCK, terms)
                    values = Matrix(v_shared, zero, key_row, BLOCK, terms)
                    queries = Matrix(q_shared, zero, query_row, width, columns)
                    grads = Matrix(grad_shared, zero, query_row, width, columns)
                    wide_queries, wide_grads = queries._replace(columns=terms), grads._replace(columns=terms)
                    (scores,) = panels.matmuls([(start_of_scores(index), keys, turned(wide_queries))], interpret)
                    lse = hopper.read(lse_shared.at[some], plgpu.Layout.WGMMA.reduce(0))
                    weights = jnp.exp2(scores * scale - hopper.along_rows(lse, scores.shape))
                    # as in `attention_backward`
                    weights = lax.optimization_barrier(weights.astype(jnp.bfloat16))
                    if first_step:
                        plgpu.barrier_wait(grad_barrier.at[block])
                        pl.when(block == 0)(lambda: plgpu.barrier_wait(v_barrier.at[group]))

                    def delta_ready(first_step=first_step):
                        if first_step:
                            plgpu.barrier_wait(delta_barrier.at[block])

                    def share(ds, part=part, index=index, first_step=first_step, zero=zero, key_row=key_row):
                        if first_step:

                            @pl.when(block > 0)
                            def _():
                                plgpu.barrier_wait(free_barrier)

                                @pl.when(owner(jnp.maximum(block - 1, 0)) & more)
                                def _():
                                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                                    load_queries(head + step, block - 1)

                        for panel in range(width // panels.PANEL):
                            place = part * width // panels.PANEL + panel
                            piece = ds[:, panels.PANEL * panel : panels.PANEL * (panel + 1)]
                            ds_shared[zero, place, pl.ds(key_row, BLOCK)] = piece
                        if index:
                            plgpu.commit_smem()  # after which all warps have used the values

                    products, dvs[index] = panels.matmuls(
                        [(None, values, turned(wide_grads)), (dvs[index], weights, grads)], interpret, delta_ready
                    )
                    delta = hopper.read(delta_shared.at[some], plgpu.Layout.WGMMA.reduce(0))
                    # Unpacked here: the compiler would do it before the matmul, and keep both forms.
                    ds = lax.optimization_barrier(weights).astype(jnp.float32) * (
                        products - hopper.along_rows(delta, products.shape)
                    )
                    ds = ds.astype(jnp.bfloat16)
                    (dks[index],) = panels.matmuls(
                        [(dks[index], ds, queries)], interpret, lambda ds=ds, share=share: share(ds)
                    )
            plgpu.barrier_arrive(full_barrier.at[block])

            @pl.when(owner(block))
            def _():
                plgpu.barrier_wait(full_barrier.at[block])
                pl.when(more & (block < 2))(lambda: load_grad(head + step, block))
                zero = hopper.opaque(turn + block)
                left = turned(Matrix(ds_shared, zero, BLOCK * zero, ROWS, BLOCK))
                for start, size in pieces:
                    right = Matrix(k_shared, zero, BLOCK * zero, ROWS, size, start // panels.PANEL)
                    (dq,) = panels.matmuls([(None, left, right)], interpret)
                    if start + size == columns:
                        plgpu.barrier_arrive(free_barrier)
                    places = Matrix(q_shared, zero, BLOCK * block, BLOCK, size, start // panels.PANEL).places
                    panels.write(places, (dq * unscale).astype(jnp.bfloat16))
                plgpu.commit_smem()
                store(dq_ref, Matrix(q_shared, zero, BLOCK * block, BLOCK, columns).places, head, block)

            return dks, dvs

        zeros = [hopper.zeros((BLOCK, columns), jnp.float32) for _ in own]
        dks, dvs = lax.fori_loop(0, BLOCKS, add, (zeros, zeros))

        def stage(ref, sums, places):
            for total, where in zip(sums, places, strict=True):
                panels.write(where, total.astype(jnp.bfloat16))
            plgpu.commit_smem()
            for block, where in zip(own, places, strict=True):
                store(ref, where, head, block)

        stage(dv_ref, dvs, [Matrix(v_shared, 0, BLOCK * block, BLOCK, columns).places for block in own])
        plgpu.barrier_wait(free_barrier)
        pl.when(more)(lambda: load_keys(head + step))
        rest = Matrix(grad_shared, 0, BLOCK * last_grad, BLOCK, columns).places
        pieces_of_ds = [Place(ds_shared, 0, panel, BLOCK * block, BLOCK) for panel in range(2) for block in own]
        stage(dk_ref, [dk * unscale for dk in dks], [pieces_of_ds[:PANELS], rest])
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
