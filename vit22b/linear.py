"""Matmuls with kernels that are split over the mesh: into the MLP's and the heads' space, and back.

Between blocks activations lie as `residual` says, inside as HIDDEN. A kernel is split over 'model' for tensor
parallelism and over 'data', over which it is gathered for use (FSDP), in the dtype of its input.

Communication is XLA's, or in rings beside the matmuls (vit22b/ring.py), as `overlap` says. Letters as in layers.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh, reshard

from vit22b import fp8, ring
from vit22b.matmul import DTYPES, matmul
from vit22b.model_config import ModelConfig
from vit22b.sharding import BATCH, BY_IMAGE, HIDDEN, RESIDUAL

KERNEL_IN = P("data", "model")  # (D, K): read by column_parallel
KERNEL_OUT = P(("model", "data"), None)  # (K, D): read by row_parallel
KERNEL_OUT_2D = P("model", "data")  # the same, where that does not do; see `kernel_out`
PARTS = P(*BATCH, None, None, unreduced={"model"})  # (B, T, D): of each device, to be summed over 'model'
# Older ones fail to reshape what read_as makes, as a scan with several layers in an iteration must.
RESHAPES_REDUCED = jax.__version_info__ >= (0, 12)


def kernel_out(rows: int, config: ModelConfig) -> P:
    """How a kernel of so many rows lies that `row_parallel` reads, on the mesh in force.

    By rows, where these can be divided: so the sum of its gradients over 'data' leaves every device with values that
    are neighbours in memory. Split by columns, they and the weights that are gathered are transposed: 22 of 471 ms at
    width 6144 on two H200s. But rings gather columns.
    """
    sizes = get_abstract_mesh().shape
    return KERNEL_OUT_2D if config.overlap == "rings" or rows % (sizes["model"] * sizes["data"]) else KERNEL_OUT


def _gather_themselves(config: ModelConfig) -> bool:
    """Whether the matmuls in force, rings' or fp8's, gather what they multiply: stream and kernels stay as they lie."""
    return config.matmul == "fp8" or config.overlap == "rings"


def residual(batch: int, config: ModelConfig) -> P:
    """How the residual stream (B, T, D) lies between blocks, on the mesh in force.

    In its width for rings and fp8, which gather that themselves. Else by images, over 'model' as well, where they can
    be divided: so norms find whole rows, and what is gathered and summed is in one piece.
    """
    sizes = get_abstract_mesh().shape
    if _gather_themselves(config) or batch % math.prod(sizes.values()):
        return RESIDUAL
    return BATCH if sizes["model"] == 1 else BY_IMAGE


def read_as(config: ModelConfig) -> P:
    """How `column_parallel` takes the stream: as it lies for rings and fp8; else whole, in a type whose gradients of
    several readers are added on each device before they are summed over 'model'.
    """
    if _gather_themselves(config):
        return RESIDUAL
    in_groups = 1 < config.scan_unroll < config.depth
    if get_abstract_mesh().shape["model"] == 1 or (in_groups and not RESHAPES_REDUCED):
        return BATCH
    return P(*BATCH, reduced={"model"})


def gathered(kernels: list[jax.Array], spec: P, config: ModelConfig) -> list[jax.Array]:
    """fp32 kernels as they are multiplied by: whole over 'data' and cast, `spec` being COLUMN or ROW. But rings gather
    them themselves, and fp8 rounds them first.

    For halves in a type whose gradients, one of each half, are added before they are summed over devices.
    """
    if _gather_themselves(config):
        return kernels
    if config.overlap == "halves":
        spec = P(*spec, reduced={"replica", "data"})
    return [reshard(w.astype(DTYPES[config.matmul]), spec) for w in kernels]


def column_parallel(
    xs: list[jax.Array],
    kernels: list[jax.Array],
    regions: list[str],
    config: ModelConfig,
    length: jax.Array | None,
    pallas: bool,
) -> list[jax.Array]:
    """`x @ kernel` for each (D, K) kernel, `gathered` as COLUMN: a list of (B, T, K), K split over 'model'.

    `xs`: the same (B, T, D) for each kernel, or once for all; as `read_as` says. `regions`: for each kernel the scope
    that its matmuls are put under, for profiles. For fp8, `length` is what no row of x exceeds in length, and kernels
    for GPUs quantize if `pallas`.
    """
    if config.matmul == "fp8":
        assert length is not None
        return fp8.column(xs[0], length, kernels, tuple(regions), pallas)
    if config.overlap == "rings":
        return _column_rings(xs[0], [w.astype(xs[0].dtype) for w in kernels])
    outputs = []
    for x_BTD, w, region in zip(xs if len(xs) > 1 else xs * len(kernels), kernels, regions, strict=True):
        with jax.named_scope(region):
            outputs.append(matmul("btd,dk->btk", x_BTD, w, HIDDEN))
    return outputs


def row_parallel(
    inputs: list[jax.Array], kernels: list[jax.Array], regions: list[str], config: ModelConfig, pallas: bool
) -> jax.Array:
    """The sum over pairs of `x @ kernel`, (B, T, K) @ (K, D) with K split over 'model', kernels `gathered` as ROW: (B,
    T, D) as `residual` says or as PARTS.
    """
    if config.matmul == "fp8":
        return fp8.row(inputs, kernels, tuple(regions), pallas)
    if config.overlap == "rings":
        return _row_rings(inputs, [w.astype(x.dtype) for x, w in zip(inputs, kernels, strict=True)])
    # One product may be what remat=dots keeps: not the whole stream on each device.
    in_parts = len(inputs) > 1 or config.overlap == "halves"
    spec = PARTS if in_parts else residual(inputs[0].shape[0], config)
    outputs = []
    for x, w, region in zip(inputs, kernels, regions, strict=True):
        with jax.named_scope(region):
            outputs.append(matmul("btk,kd->btd", x, w, spec))
    return functools.reduce(jnp.add, outputs)


def sum_replicas_later(blocks):
    """The same stacked blocks, in a type whose gradients stay each replica's own until they have left the scan."""

    def defer(w: jax.Array) -> jax.Array:
        spec = jax.typeof(w).sharding.spec
        return reshard(w, P(*spec, reduced={"replica"})) if "data" in spec else w

    return jax.tree.map(defer, blocks)


def _column_rings(x_BTD: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    kernel = P(*KERNEL_IN, reduced={"replica"})

    def local(x_BTd, shards):
        joined = ring.all_gather(jnp.concatenate(shards, 1), "data", 0)  # one ring for all
        return ring.gather_matmul(x_BTd, _split(joined, [w.shape[1] for w in shards], 1), "model")

    rings = jax.shard_map(local, in_specs=(RESIDUAL, kernel), out_specs=HIDDEN, check_vma=False)
    return rings(x_BTD, [reshard(w, kernel) for w in weights])


def _row_rings(inputs: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    kernel = P(*KERNEL_OUT_2D, reduced={"replica"})

    def local(inputs, shards):
        joined = ring.all_gather(jnp.concatenate(shards, 0), "data", 1)
        return ring.matmul_scatter(inputs, _split(joined, [w.shape[0] for w in shards], 0), "model")

    rings = jax.shard_map(local, in_specs=(HIDDEN, kernel), out_specs=RESIDUAL, check_vma=False)
    return rings(inputs, [reshard(w, kernel) for w in weights])


def _split(x: jax.Array, sizes: list[int], dim: int) -> list[jax.Array]:
    """`x` cut along `dim` into parts of these sizes."""
    return jnp.split(x, [sum(sizes[:i]) for i in range(1, len(sizes))], axis=dim)
