"""What the attention kernels share: matrices of a head in shared memory, copies to and from it, matmuls of a warpgroup.

In Pallas' form for Mosaic GPU. Everything here is for one head's (T, H) matrices, in blocks of 64 rows, in columns as
wide as shared memory can swizzle: 64 of bf16. Copies that reach beyond an array's end read 0 and write nothing there,
so that any length and any head dim up to 64 will do.
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
PROGRAMS = 132  # multiprocessors of an H100 or H200
LOG2_E = math.log2(math.e)


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def shared(slots: int, rows: int) -> Any:
    """Shared memory for matrices, as tensor cores want it."""
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))
    return plgpu.SMEM((slots, rows, WIDTH), jnp.bfloat16, transforms=transforms)


def barriers(count: int, arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def load(ref: Any, memory: Any, place: tuple, start: Any, rows: int, slot: Any, barrier: Any, interpret: bool) -> None:
    """Starts to copy rows of a head, from `start`, to the slot of shared memory, to the same rows if it has all."""
    to = start if memory.shape[1] > rows else 0
    view = _plain(memory, slot, to, rows, interpret)
    plgpu.copy_gmem_to_smem(window(ref, place, start, rows), view, barrier)


def store(ref: Any, memory: Any, place: tuple, start: Any, rows: int, slot: Any, interpret: bool) -> None:
    """Starts to copy them back, as a group of copies of its own."""
    view = _plain(memory, slot, start, rows, interpret)
    plgpu.copy_smem_to_gmem(view, window(ref, place, start, rows), commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def _plain(ref: Any, slot: Any, start: Any, rows: int, interpret: bool) -> Any:
    """Rows of what `shared` gave, for copies.

    A tile is as wide as the matrix, so tiling does not move anything. Copies must not know of it: they could then only
    take device arrays of whole tiles, where lengths are multiples of 8.
    """
    if interpret:  # buffers are not tiled there, and cannot be reshaped
        return ref.at[slot, pl.ds(start, rows)]
    view = TransformedRef(ref.ref, (mosaic_core.UnswizzleRef(2 * WIDTH),))
    return view.at[slot, pl.ds(eighth(start), rows // 8)].reshape(rows, WIDTH)


def eighth(start: Any) -> Any:
    """The tile, of 8 rows, that starts at a row."""
    return start // 8 if isinstance(start, int) else lax.div(start, jnp.int32(8))


def window(ref: Any, place: tuple[Any, Any], start: Any, rows: int, column: int = 0, columns: int = WIDTH) -> Any:
    """Rows, and some columns, of a head in device memory, (B, T, N, H)."""
    batch, head = place
    zero = batch * 0  # not known to be in or out of bounds
    return ref.at[batch, pl.ds(zero + start, rows), head, pl.ds(zero + column, columns)]


def place_of(head: Any, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Batch and head, of a count of all heads."""
    return lax.div(head, jnp.int32(num_heads)), lax.rem(head, jnp.int32(num_heads))


def matmuls(sums: list[tuple], interpret: bool, meanwhile: Callable = lambda: None) -> list[jax.Array]:
    """Products of two operands, added to a start each: (start or None for 0, left, right), left from registers or
    shared memory. The tensor cores do all of them while `meanwhile` runs.
    """
    if interpret:  # takes no operands in registers
        return interpreted_matmuls([(start, left[...], right[...]) for start, left, right in sums], meanwhile)

    def body(accumulators):
        for accumulator, (_, left, right) in zip(accumulators, sums, strict=True):
            plgpu.wgmma(accumulator, left, right)
        meanwhile()

    starts = [
        zeros((left.shape[0], right.shape[1]), jnp.float32) if start is None else start for start, left, right in sums
    ]
    return pl.run_state(body)([plgpu.ACC.init(start) for start in starts])


def interpreted_matmuls(sums: list[tuple], meanwhile: Callable) -> list[jax.Array]:
    """`matmuls` of arrays."""
    totals = [left.astype(jnp.float32) @ right.astype(jnp.float32) for _, left, right in sums]
    plgpu.commit_smem()  # or copies to what was just read would seem to race: tensor cores need no such fence
    meanwhile()
    return [total if sums[i][0] is None else sums[i][0] + total for i, total in enumerate(totals)]


def turned(memory: Any) -> Any:
    """Transposed."""
    return memory.transpose((1, 0))


def read(ref: Any, layout: Any) -> jax.Array:
    """What lies in shared memory, spread over the threads of a warpgroup."""
    return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]  # JAX 0.10 wants an index, too


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per row, repeated in each column."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per column, repeated in each row."""
    return lax.broadcast_in_dim(x, shape, [1])


def zeros(shape: tuple[int, int], dtype: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)


def padded(x: jax.Array, columns: int) -> jax.Array:
    """With zero columns added."""
    if x.shape[1] == columns:
        return x
    return jnp.concatenate([x, zeros((x.shape[0], columns - x.shape[1]), x.dtype)], axis=1)


def masked(scores: jax.Array, length: int) -> jax.Array:
    """Scores of keys beyond the last one set to -inf. Only the last columns can hold such keys."""
    rows, columns = scores.shape
    if columns == length:
        return scores
    first = columns - 8
    keys = first + plgpu.broadcasted_iota(jnp.int32, (rows, 8), 1, layout=plgpu.Layout.WGMMA)
    tail = jnp.where(keys < length, scores[:, first:], -jnp.inf)
    return jnp.concatenate([scores[:, :first], tail], axis=1) if first else tail


def opaque(counter: Any) -> Any:
    """0, unknown to the compiler, which moves what depends on it, such as descriptors of matrices, out of no loop.

    There it would keep dozens of them in registers, and then spill those.
    """
    return lax.shift_right_logical(counter, jnp.int32(24))


def call(kernel: Callable, name: str, out_type: Any, scratch: list, heads: int, groups: int) -> Callable:
    """The kernel as a function of arrays, a program per multiprocessor; interpreted where there is no GPU."""
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
            unsafe_no_auto_barriers=True,  # the kernels' own barriers order all accesses of shared memory
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
