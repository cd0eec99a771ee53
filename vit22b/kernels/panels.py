"""Matrices of a head of 65 to 96 columns in shared memory, for the attention kernels; narrower ones are in `hopper.py`.

They lie in three panels of 32 columns, one after another, each with a 64-byte swizzle: the tensor cores take all panels
as one operand, if their distance is told, and a copy fills one. Pallas' own `wgmma` cannot be told: it only takes
matrices whose panels alternate every 8 rows, which copies could only fill 8 rows at a time. So here the instructions
are made one by one. That also allows sums over any multiple of 16, and results of any multiple of 8 columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper

AVAILABLE = hopper.AVAILABLE and jax.__version_info__ >= (0, 11, 2)  # the oldest that this was tried with
if AVAILABLE:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils as mgpu_utils
    from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

PANEL = 32  # columns
PANELS = 3
WIDTH = PANELS * PANEL
STEP = 16  # terms of a sum that an instruction adds up
COLUMN_UNIT = 8  # results have a multiple of so many columns
ROW = 2 * PANEL  # bytes
WAIT = "wgmma.wait_group.sync.aligned 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def sizes(head_dim: int) -> tuple[int, int]:
    """Columns of results, and of operands to sum over."""
    return hopper.round_up(head_dim, COLUMN_UNIT), hopper.round_up(head_dim, STEP)


class Place(NamedTuple):
    """Rows of a panel in shared memory."""

    memory: Any
    slot: Any
    panel: int
    start: Any
    rows: int

    @property
    def ref(self) -> Any:
        return self.memory.at[self.slot, self.panel, pl.ds(self.start, self.rows)]

    def plain(self, interpret: bool) -> Any:
        """For copies; see `hopper._plain`."""
        if interpret:
            return self.ref
        view = hopper.TransformedRef(self.memory.ref, (hopper.mosaic_core.UnswizzleRef(ROW),))
        view = view.at[self.slot, self.panel, pl.ds(hopper.eighth(self.start), self.rows // 8)]
        return view.reshape(self.rows, PANEL)


class Matrix(NamedTuple):
    """Rows of a matrix in shared memory, for a matmul; `turned` is its transpose."""

    memory: Any
    slot: Any
    start: Any
    rows: int
    columns: int
    first_panel: int = 0
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.turned else (self.rows, self.columns)

    @property
    def places(self) -> list[Place]:
        """Of 32 columns each."""
        indices = range(self.first_panel, self.first_panel + hopper.round_up(self.columns, PANEL) // PANEL)
        return [Place(self.memory, self.slot, panel, self.start, self.rows) for panel in indices]

    @property
    def distance(self) -> int:
        """Bytes from a panel to the next."""
        return self.memory.shape[2] * ROW

    def read(self) -> jax.Array:
        """Where interpreted."""
        whole = jnp.concatenate([place.ref[...] for place in self.places], axis=1)[:, : self.columns]
        return whole.T if self.turned else whole


def turned(matrix: Matrix) -> Matrix:
    return matrix._replace(turned=not matrix.turned)


def shared(slots: int, rows: int, panels: int = PANELS) -> Any:
    transforms = (plgpu.TilingTransform((8, PANEL)), plgpu.SwizzleTransform(ROW))
    return plgpu.SMEM((slots, panels, rows, PANEL), jnp.bfloat16, transforms=transforms)


def load(ref: Any, memory: Any, place: tuple, start: Any, rows: int, slot: Any, barrier: Any, interpret: bool) -> None:
    """As `hopper.load`; arrives once for each panel."""
    to = start if memory.shape[2] > rows else 0
    for panel in range(PANELS):
        view = Place(memory, slot, panel, to, rows).plain(interpret)
        plgpu.copy_gmem_to_smem(hopper.window(ref, place, start, rows, PANEL * panel, PANEL), view, barrier)


def write(places: list[Place], x: jax.Array) -> None:
    """Writes a panel to each of the places, with columns of 0 where `x` has none."""
    x = hopper.padded(x, PANEL * len(places))
    for index, place in enumerate(places):
        place.ref[...] = x[:, PANEL * index : PANEL * (index + 1)]


def store(ref: Any, places: list[Place], place: tuple, start: Any, interpret: bool) -> None:
    """As `hopper.store`, of a panel at each of the places."""
    for panel, part in enumerate(places):
        window = hopper.window(ref, place, start, part.rows, PANEL * panel, PANEL)
        plgpu.copy_smem_to_gmem(part.plain(interpret), window, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def matmuls(sums: list[tuple], interpret: bool, meanwhile: Callable = lambda: None) -> list[jax.Array]:
    """As `hopper.matmuls`; operands in shared memory are of type `Matrix`."""
    if interpret:
        arrays = [tuple(x.read() if isinstance(x, Matrix) else x for x in operands) for operands in sums]
        return hopper.interpreted_matmuls(arrays, meanwhile)

    starts = [
        hopper.zeros((left.shape[0], right.shape[1]), jnp.float32) if start is None else start
        for start, left, right in sums
    ]
    lefts, rights = [left for _, left, _ in sums], [right for _, _, right in sums]
    kind = plgpu.Layout.WGMMA
    results = [plgpu.ShapeDtypeStruct(start.shape, jnp.dtype(jnp.float32), layout=kind) for start in starts]

    @plgpu.inline_mgpu(
        arg_types=(
            [kind] * len(sums),
            [plgpu.RefType() if isinstance(left, Matrix) else kind for left in lefts],
            [plgpu.RefType()] * len(sums),
        ),
        return_type=results,
    )
    def begin(_, accumulators, left_places, right_places):
        found = []
        for accumulator, left, right, *places in zip(
            accumulators, lefts, rights, left_places, right_places, strict=True
        ):
            found.append(_multiply(accumulator, left, right, *places))
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], COMMIT, "", has_side_effects=True)
        return found

    @plgpu.inline_mgpu(arg_types=([kind] * len(sums),), return_type=results)
    def end(_, accumulators):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], WAIT, "", has_side_effects=True)
        found = mgpu.optimization_barrier(*accumulators)  # or uses of results could be moved before the wait
        return [found] if len(accumulators) == 1 else list(found)

    totals = begin(starts, [_first(left) for left in lefts], [_first(right) for right in rights])
    meanwhile()
    return end(totals)


def _first(operand: Any) -> Any:
    """The first rows, as they lie in memory, of an operand there."""
    if not isinstance(operand, Matrix):
        return operand
    return operand.memory.ref.at[operand.slot, operand.first_panel, pl.ds(hopper.eighth(operand.start), 1)]


def _multiply(accumulator: Any, left: Any, right: Matrix, left_place: Any, right_place: Any) -> Any:
    """Issues the instructions; the result is not there yet."""
    accumulator = mgpu.WGMMAAccumulator.from_registers(accumulator)  # fences
    in_memory = isinstance(left, Matrix)
    if in_memory:
        left_descriptor = _descriptor(left, left_place, left.turned)
    else:
        left_values = wgmma_fence(left_place)
    right_descriptor = _descriptor(right, right_place, not right.turned)
    registers = accumulator._value.registers
    size = hopper.round_up(right.shape[0], STEP)
    assert size == hopper.round_up(left.shape[1], STEP)
    element = ir.BF16Type.get()
    types: dict[str, Any] = {"a_element_type": element, "b_element_type": element}  # which JAX 0.10 does not know
    for step in range(size // STEP):
        if in_memory:
            a = _moved(left_descriptor, left, step, left.turned)
        else:
            a = left_values[:, STEP * step : STEP * (step + 1)]
        registers = wgmma_m64(
            registers,
            a,
            _moved(right_descriptor, right, step, not right.turned),
            a_transpose=left.turned if in_memory else None,
            b_transpose=not right.turned,
            a_k_stride=STEP if in_memory else None,  # for more than a step
            b_k_stride=STEP,
            n=right.shape[1],
            swizzle=2 * STEP,  # so much as to the number of steps
            **types,
        )
    value = mgpu.FragmentedArray(_registers=registers, _layout=accumulator._value.layout, _is_signed=None)
    return mgpu.WGMMAAccumulator(_value=value, _original_layout=accumulator._original_layout, _sync=False).value


def _descriptor(matrix: Matrix, place: Any, sum_of_rows: bool) -> tuple[Any, Any]:
    """Where a matrix lies, in two words: its rows in groups of 8, and its panels, of which only sums of rows know.

    As `mma_utils.encode_descriptor`, which would count in 64 bits, in twice the registers.
    """
    word = ir.IntegerType.get_signless(32)
    address = llvm.ptrtoint(word, mgpu_utils.memref_ptr(place))
    address = arith.shrui(arith.andi(address, _constant(0x3FFFF)), _constant(4))
    distance = matrix.distance // 16 if sum_of_rows else 0
    return arith.ori(address, _constant(distance << 16)), _constant(8 * ROW // 16 | 2 << 30)  # 2: a 64-byte swizzle


def _moved(descriptor: tuple[Any, Any], matrix: Matrix, step: int, sum_of_rows: bool) -> Any:
    """To the 16 rows or columns of a step, in one word."""
    low, high = descriptor
    panel, column = divmod(STEP * step, PANEL)
    offset = STEP * ROW * step if sum_of_rows else matrix.distance * panel + 2 * column
    low = arith.addi(low, _constant(offset // 16))
    wide = ir.IntegerType.get_signless(64)
    high = arith.shli(arith.extui(wide, high), mgpu_utils.c(32, wide))
    return arith.ori(arith.extui(wide, low), high)


def _constant(value: int) -> Any:
    return mgpu_utils.c(value - (value >> 31 << 32), ir.IntegerType.get_signless(32))
