"""Self-attention of short sequences, for Hopper, written in Pallas for Mosaic GPU.

At most 256 tokens: a head's keys and values fit into shared memory as a whole. So a row of scores is held at once and
its softmax needs no running maximum, and the backward pass adds up each gradient in registers, without atomics.
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

try:  # no public names, which another JAX may lack
    from jax._src.pallas.mosaic_gpu import core as mosaic_core
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax._src.state.types import TransformedRef

    AVAILABLE = jax.__version_info__ >= (0, 11)
except ImportError:
    AVAILABLE = False

BLOCK = 64  # rows of a matmul of a warpgroup
WIDTH = 64  # columns of bf16 that fill 128 bytes, the widest swizzle
MAX_LENGTH = 256
SHARED_BYTES = 232_448  # that a thread block may have
PROGRAMS = 132  # multiprocessors of an H100 or H200
CHUNK = 128  # keys whose scores a warpgroup holds at once
BACKWARD_GROUPS = (0, 1, 2, 3, 2)  # warpgroups for each number of blocks of keys: 4 would want for registers
AUTO_BARRIERS = True  # before accesses of shared memory
LOG2_E = math.log2(math.e)


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v per head, softmax in fp32, of bf16 arrays (B, T, N, H) on one device.

    For the backward pass it keeps its arguments, its result and a number per query and head.
    """
    return forward(q, k, v)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = forward(q, k, v)
    return out, (q, k, v, out, lse)


def _attention_backward(kept: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = kept
    return tuple(backward(q, k, v, out, lse, grad))


attention.defvjp(_attention_forward, _attention_backward)


def fits(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> bool:
    """Whether `attention` takes queries of this shape (B, T, N, H), and runs under this JAX."""
    _, length, _, head_dim = shape
    if (
        not AVAILABLE
        or dtype != jnp.bfloat16
        or not 8 <= length <= MAX_LENGTH
        or head_dim % 8
        or not 8 <= head_dim <= 128
    ):
        return False
    padded, width = _up(length, BLOCK), WIDTH * len(_parts(head_dim))
    forward_bytes = 4 * width * (2 * padded + _up(length, 8)) + 8 * padded
    backward_bytes = 2 * padded * (6 * width + BLOCK) + 8 * padded
    return max(forward_bytes, backward_bytes) + 512 <= SHARED_BYTES


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _parts(head_dim: int) -> list[int]:
    """Where the parts start into which a head's columns are split, each as wide as shared memory can swizzle."""
    return list(range(0, head_dim, WIDTH))


def _shared(slots: int, rows: int) -> Any:
    """Shared memory for parts of matrices, as tensor cores want it."""
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))
    return plgpu.SMEM((slots, rows, WIDTH), jnp.bfloat16, transforms=transforms)


def _plain(ref: Any, slot: Any, start: Any, rows: int, interpret: bool) -> Any:
    """Rows of what `_shared` gave, for copies.

    A tile is as wide as the matrix, so tiling does not move anything. Copies must not know of it: they could then only
    take device arrays of whole tiles, where lengths are multiples of 8.
    """
    if interpret:  # buffers are not tiled there, and cannot be reshaped
        return ref.at[slot, pl.ds(start, rows)]
    view = TransformedRef(ref.ref, (mosaic_core.UnswizzleRef(2 * WIDTH),))
    first = start // 8 if isinstance(start, int) else lax.div(start, jnp.int32(8))
    return view.at[slot, pl.ds(first, rows // 8)].reshape(rows, WIDTH)


def _window(ref: Any, place: tuple[Any, Any], start: Any, rows: int, part: int) -> Any:
    """Rows and columns of a head in device memory, (B, T, N, H). Beyond its ends it reads 0 and writes nothing."""
    batch, head = place
    zero = batch * 0  # not known to be in or out of bounds
    return ref.at[batch, pl.ds(zero + start, rows), head, pl.ds(zero + part, WIDTH)]


def _place(head: Any, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Batch and head, of a count of all heads."""
    return lax.div(head, jnp.int32(num_heads)), lax.rem(head, jnp.int32(num_heads))


def _matmuls(sums: list[tuple], interpret: bool, meanwhile: Callable = lambda: None) -> list[jax.Array]:
    """Sums of matmuls, each given as its start (None: 0) and pairs of operands, left ones from registers or shared
    memory. The tensor cores do all of them while `meanwhile` runs.
    """
    if interpret:  # takes no operands in registers
        wide = [[[x[...].astype(jnp.float32) for x in pair] for pair in pairs] for _, pairs in sums]
        totals = [functools.reduce(jnp.add, [left @ right for left, right in pairs]) for pairs in wide]
        plgpu.commit_smem()  # or copies to what was just read would seem to race: tensor cores need no such fence
        meanwhile()
        return [total if sums[i][0] is None else sums[i][0] + total for i, total in enumerate(totals)]

    def body(accumulators):
        for accumulator, (_, pairs) in zip(accumulators, sums, strict=True):
            for left, right in pairs:
                plgpu.wgmma(accumulator, left, right)
        meanwhile()

    starts = [
        _zeros((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32) if start is None else start
        for start, pairs in sums
    ]
    return pl.run_state(body)([plgpu.ACC.init(start) for start in starts])


def _turned(memory: Any) -> Any:
    return memory.transpose((1, 0))


def _read(ref: Any, layout: Any) -> jax.Array:
    """What lies in shared memory, spread over the threads of a warpgroup."""
    return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]  # JAX 0.10 wants an index, too


def _columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per row, along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def _rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per column, along the rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def _zeros(shape: tuple[int, int], dtype: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)


def _padded(x: jax.Array, columns: int) -> jax.Array:
    """With zero columns added."""
    if x.shape[1] == columns:
        return x
    return jnp.concatenate([x, _zeros((x.shape[0], columns - x.shape[1]), x.dtype)], axis=1)


def _masked(scores: jax.Array, length: int) -> jax.Array:
    """Scores of keys beyond the last one set to -inf. Only the last columns can hold such keys."""
    rows, columns = scores.shape
    if columns == length:
        return scores
    first = columns - 8
    keys = first + plgpu.broadcasted_iota(jnp.int32, (rows, 8), 1, layout=plgpu.Layout.WGMMA)
    tail = jnp.where(keys < length, scores[:, first:], -jnp.inf)
    return jnp.concatenate([scores[:, :first], tail], axis=1) if first else tail


def _load(ref: Any, shared: list, place: Any, start: Any, rows: int, slot: Any, barrier: Any, interpret: bool) -> None:
    """Starts to copy rows of a head, from `start`, to the slot of shared memory, to the same rows if it has all."""
    to = start if shared[0].shape[1] > rows else 0
    for part, memory in zip(_parts(ref.shape[-1]), shared, strict=True):
        view = _plain(memory, slot, to, rows, interpret)
        plgpu.copy_gmem_to_smem(_window(ref, place, start, rows, part), view, barrier)


def _store(ref: Any, shared: list, place: Any, start: Any, rows: int, slot: Any, interpret: bool) -> None:
    for part, memory in zip(_parts(ref.shape[-1]), shared, strict=True):
        plgpu.copy_smem_to_gmem(
            _plain(memory, slot, start, rows, interpret), _window(ref, place, start, rows, part), commit_group=False
        )
    plgpu.commit_smem_to_gmem_group()


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
    interpret: bool,
):
    """A warpgroup takes 64 queries of each head. The next head is meanwhile copied to the other slot."""
    batch, length, num_heads, head_dim = q_ref.shape
    keys, padded = _up(length, 8), _up(length, BLOCK)
    group, groups = lax.axis_index("group"), lax.axis_size("group")
    scale = LOG2_E / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    query = BLOCK * group

    def load_queries(head, slot):
        place = _place(head, num_heads)
        _load(q_ref, q_shared, place, query, BLOCK, slot, q_barrier.at[slot * groups + group], interpret)

    def load_rest(head, slot):
        place = _place(head, num_heads)
        _load(k_ref, k_shared, place, 0, keys, slot, k_barrier.at[slot], interpret)
        _load(v_ref, v_shared, place, 0, padded, slot, v_barrier.at[slot], interpret)

    load_queries(first, 0)
    pl.when(group == 0)(lambda: load_rest(first, 0))

    turns = lax.div(heads - 1 - first, step) + 1

    @pl.loop(0, turns)
    def _(turn):
        head, slot = first + turn * step, lax.rem(turn, jnp.int32(2))
        queries = [memory.at[slot, pl.ds(query, BLOCK)] for memory in q_shared]
        plgpu.barrier_wait(q_barrier.at[slot * groups + group])
        plgpu.barrier_wait(k_barrier.at[slot])

        def scored(start, columns):
            pairs = [(q, _turned(k.at[slot, pl.ds(start, columns)])) for q, k in zip(queries, k_shared, strict=True)]
            (scores,) = _matmuls([(None, pairs)], interpret)
            return _masked(scores, length - start)

        def weighted(weights, start, outs):
            values = [v.at[slot, pl.ds(start, weights.shape[1])] for v in v_shared]
            return _matmuls([(out, [(weights, v)]) for v, out in zip(values, outs, strict=True)], interpret)

        top: Any = None
        total: Any = None
        outs: list[Any] = [None] * len(v_shared)
        for start in range(0, length, CHUNK):
            columns = min(CHUNK, keys - start)
            scores = scored(start, columns)
            if not start:

                @pl.when(head + step < heads)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_queries(head + step, 1 - slot)

                    @pl.when(group == 0)
                    def _():
                        pl.when(turn > 0)(lambda: plgpu.barrier_wait(free_barrier.at[1 - slot]))
                        load_rest(head + step, 1 - slot)

            highest = scores.max(axis=1) * scale
            if start:
                highest = jnp.maximum(top, highest)
                shrink = jnp.exp2(top - highest)
                total = total * shrink
                outs = [out * _columns(shrink, out.shape) for out in outs]
            top = highest
            weights = jnp.exp2(scores * scale - _columns(top, scores.shape))
            part = weights.sum(axis=1)
            total = total + part if start else part
            if not start:
                plgpu.barrier_wait(v_barrier.at[slot])
            outs = weighted(_padded(weights.astype(jnp.bfloat16), _up(columns, BLOCK)), start, outs)
        plgpu.barrier_arrive(free_barrier.at[slot])
        inverse = 1 / total
        for memory, out in zip(queries, outs, strict=True):
            memory[...] = (out * _columns(inverse, out.shape)).astype(jnp.bfloat16)
        lse_shared[slot, pl.ds(query, BLOCK)] = top + jnp.log(total) * LOG2_E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            lse_shared.at[slot, pl.ds(query, BLOCK)], lse_ref.at[head, pl.ds(query, BLOCK)], commit_group=False
        )
        _store(out_ref, q_shared, _place(head, num_heads), query, BLOCK, slot, interpret)

    plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 0)
    def _():
        # the last ones that nobody waited for
        plgpu.barrier_wait(free_barrier.at[lax.rem(turns - 1, jnp.int32(2))])
        pl.when(turns > 1)(lambda: plgpu.barrier_wait(free_barrier.at[lax.rem(turns, jnp.int32(2))]))


def _backward_kernel(
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
    interpret: bool,
):
    """A warpgroup takes some blocks of 64 keys of each head and goes through all queries, 64 at a time; scores lie
    transposed.

    It adds up its part of the gradients of keys and values in registers. Gradients of scores go to shared memory, where
    for each block of queries one warpgroup, its owner, multiplies them with all keys. The owner also copies those
    queries, outputs and their gradients, and takes the sums of products of the latter two.
    """
    batch, length, num_heads, head_dim = q_ref.shape
    padded = _up(length, BLOCK)
    blocks, groups = padded // BLOCK, lax.axis_size("group")
    each = blocks // groups
    group = lax.axis_index("group")
    scale = LOG2_E / math.sqrt(head_dim)
    first, step, heads = lax.axis_index("block"), jnp.int32(lax.axis_size("block")), batch * num_heads
    own = [group * each + index for index in range(each)]
    turns = lax.div(heads - 1 - first, step) + 1

    def rows(block):
        return pl.ds(BLOCK * block, BLOCK)

    def owner(block):
        return group == lax.div(block, jnp.int32(each))

    def load(ref, shared, barrier, head, block, slot=0):
        _load(ref, shared, _place(head, num_heads), BLOCK * block, BLOCK, slot, barrier, interpret)

    def load_keys(head, slot):
        for block in own:
            load(k_ref, k_shared, k_barrier.at[slot], head, block, slot)

    def load_queries(head, block):
        load(q_ref, q_shared, q_barrier.at[block], head, block)
        plgpu.copy_gmem_to_smem(lse_ref.at[head, rows(block)], lse_shared.at[rows(block)], q_barrier.at[block])
        load(grad_ref, grad_shared, grad_barrier.at[block], head, block)

    def load_rest(head):
        for block in own:
            load(v_ref, v_shared, v_barrier.at[group], head, block)
            load(out_ref, out_shared, out_barrier.at[block], head, block)

    def store(ref, shared, head, block):
        _store(ref, shared, _place(head, num_heads), BLOCK * block, BLOCK, 0, interpret)

    load_keys(first, 0)
    for block in own:
        load_queries(first, block)
    load_rest(first)

    def find_delta(block):
        plgpu.barrier_wait(out_barrier.at[block])
        plgpu.barrier_wait(grad_barrier.at[block])
        delta = None
        for out, grad in zip(out_shared, grad_shared, strict=True):
            products = [
                _read(memory.at[0, rows(block)], plgpu.Layout.WGMMA).astype(jnp.float32) for memory in (out, grad)
            ]
            part = (products[0] * products[1]).sum(axis=1)
            delta = part if delta is None else delta + part
        delta_shared[rows(block)] = delta
        plgpu.barrier_arrive(delta_barrier.at[block])

    @pl.loop(0, turns)
    def _(turn):
        head, slot = first + turn * step, lax.rem(turn, jnp.int32(2))
        more = head + step < heads
        pl.when(group == 0)(lambda: find_delta(0))
        plgpu.barrier_wait(k_barrier.at[slot])

        def add(block, sums):
            dks, dvs = list(sums[0]), list(sums[1])
            queries = [memory.at[0, rows(block)] for memory in q_shared]
            grads = [memory.at[0, rows(block)] for memory in grad_shared]
            plgpu.barrier_wait(q_barrier.at[block])
            for index, key_block in enumerate(own):
                keys = [memory.at[slot, rows(key_block)] for memory in k_shared]
                values = [memory.at[0, rows(key_block)] for memory in v_shared]
                (scores,) = _matmuls([(None, [(k, _turned(q)) for k, q in zip(keys, queries, strict=True)])], interpret)
                lse = _read(lse_shared.at[rows(block)], plgpu.Layout.WGMMA.reduce(0))
                weights = jnp.exp2(scores * scale - _rows(lse, scores.shape))
                if padded != length and index == each - 1:  # for keys that do not exist: anything finite
                    places = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                    weights = jnp.where(places < length - BLOCK * key_block, weights, 0.0)
                weights = weights.astype(jnp.bfloat16)
                if not index:
                    pl.when(jnp.logical_not(owner(block)))(lambda: plgpu.barrier_wait(grad_barrier.at[block]))
                    pl.when(block == 0)(lambda: plgpu.barrier_wait(v_barrier.at[group]))
                products, *dvs[index] = _matmuls(
                    [
                        (None, [(v, _turned(g)) for v, g in zip(values, grads, strict=True)]),
                        *[(dv, [(weights, g)]) for dv, g in zip(dvs[index], grads, strict=True)],
                    ],
                    interpret,
                )
                if not index:
                    pl.when(owner(block + 1) & (block + 1 < blocks))(lambda: find_delta(block + 1))
                    plgpu.barrier_wait(delta_barrier.at[block])
                delta = _read(delta_shared.at[rows(block)], plgpu.Layout.WGMMA.reduce(0))
                ds = weights.astype(jnp.float32) * (products - _rows(delta, products.shape))
                ds = ds.astype(jnp.bfloat16)

                def share(index=index, key_block=key_block, ds=ds):
                    if not index:
                        pl.when((turn > 0) | (block > 0))(lambda: plgpu.barrier_wait(free_barrier))
                        pl.when((block == 0) & more)(lambda: load_keys(head + step, 1 - slot))
                    ds_shared[0, rows(key_block)] = ds
                    plgpu.commit_smem()

                dks[index] = _matmuls(
                    [(dk, [(ds, q)]) for dk, q in zip(dks[index], queries, strict=True)], interpret, share
                )
            plgpu.barrier_arrive(full_barrier.at[block])

            @pl.when(owner(block))
            def _():
                plgpu.barrier_wait(full_barrier.at[block])
                pl.when(more)(lambda: load_queries(head + step, block))
                left = _turned(ds_shared.at[0])
                dqs = _matmuls([(None, [(left, memory.at[slot])]) for memory in k_shared], interpret)
                plgpu.barrier_arrive(free_barrier)
                for memory, dq in zip(out_shared, dqs, strict=True):
                    memory[0, rows(block)] = (dq * (1 / math.sqrt(head_dim))).astype(jnp.bfloat16)
                plgpu.commit_smem()
                store(dq_ref, out_shared, head, block)

            return dks, dvs

        zeros = [[_zeros((BLOCK, memory.shape[-1]), jnp.float32) for memory in q_shared] for _ in own]
        dks, dvs = lax.fori_loop(0, blocks, add, (zeros, zeros))
        for block, sums in zip(own, dvs, strict=True):
            for memory, dv in zip(v_shared, sums, strict=True):
                memory[0, rows(block)] = dv.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for block in own:
            store(dv_ref, v_shared, head, block)
        plgpu.wait_smem_to_gmem(each, wait_read_only=True)
        for block, sums in zip(own, dks, strict=True):
            for memory, dk in zip(out_shared, sums, strict=True):
                memory[0, rows(block)] = (dk * (1 / math.sqrt(head_dim))).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for block in own:
            store(dk_ref, out_shared, head, block)

        @pl.when(more)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load_rest(head + step)

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_wait(free_barrier)


def _call(
    kernel: Callable, name: str, out_type: Any, scratch: list, heads: int, groups: int, interpret: Any
) -> Callable:
    """The kernel as a function of arrays; interpreted where there is no GPU."""
    if interpret is None:
        interpret = jax.default_backend() != "gpu" and InterpretGPUParams()
    return plgpu.kernel(
        functools.partial(kernel, interpret=bool(interpret)),
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(PROGRAMS, heads),),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not AUTO_BARRIERS,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )


def forward(q: jax.Array, k: jax.Array, v: jax.Array, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Attention and, for `backward`, the base-2 logarithm of the sum of exponentials of scores, (B N, T rounded up)."""
    batch, length, num_heads, head_dim = q.shape
    keys, padded, heads = _up(length, 8), _up(length, BLOCK), batch * num_heads
    parts, groups = _parts(head_dim), padded // BLOCK

    def shared(rows):
        return [_shared(2, rows) for _ in parts]

    def barrier(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    return _call(
        _forward_kernel,
        "attention_forward",
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, padded), jnp.float32)],
        [
            shared(padded),
            shared(keys),
            shared(padded),
            plgpu.SMEM((2, padded), jnp.float32),
            barrier(2 * groups, len(parts)),
            barrier(2, len(parts)),
            barrier(2, len(parts)),
            barrier(2, groups),
        ],
        heads,
        groups,
        interpret,
    )(q, k, v)


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, grad: jax.Array, interpret: Any = None
) -> list[jax.Array]:
    """Gradients of q, k and v."""
    batch, length, num_heads, head_dim = q.shape
    padded, heads = _up(length, BLOCK), batch * num_heads
    parts, blocks = _parts(head_dim), padded // BLOCK
    groups = BACKWARD_GROUPS[blocks]
    copies = len(parts)  # of which a matrix takes one each

    def shared(slots):
        return [_shared(slots, padded) for _ in parts]

    def barrier(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    vector = plgpu.SMEM((padded,), jnp.float32)
    return _call(
        _backward_kernel,
        "attention_backward",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        [
            shared(1),
            shared(2),
            shared(1),
            shared(1),
            shared(1),
            _shared(1, padded),
            vector,
            vector,
            barrier(blocks, copies + 1),
            barrier(2, blocks * copies),
            barrier(groups, blocks // groups * copies),
            barrier(blocks, copies),
            barrier(blocks, copies),
            barrier(blocks, 1),
            barrier(blocks, groups),
            plgpu.Barrier(),
        ],
        heads,
        groups,
        interpret,
    )(q, k, v, out, lse, grad)
