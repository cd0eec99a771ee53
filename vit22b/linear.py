"""Matmuls with kernels that are split over the mesh: into the MLP's and the heads' space, and back.

Between blocks activations lie as RESIDUAL, inside as HIDDEN. A kernel is split over 'model' for tensor parallelism
and, in its other dimension, over 'data': it is gathered over 'data' for use (FSDP), in the dtype of its input.

Communication is XLA's, or, with `overlap`, in rings beside the matmuls (vit22b/ring.py). Letters as in layers.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b import fp8, ring
from vit22b.config import ModelConfig
from vit22b.matmul import matmul
from vit22b.sharding import BATCH, HIDDEN, RESIDUAL

KERNEL_IN = P("data", "model")  # (D, K): read by column_parallel
KERNEL_OUT = P("model", "data")  # (K, D): read by row_parallel
COLUMN, ROW = P(None, "model"), P("model", None)  # the same kernels gathered over 'data' for use


def column_parallel(x_BTD: jax.Array, kernels: list[nnx.Param], config: ModelConfig) -> list[jax.Array]:
    """`x @ kernel` for each (D, K) kernel: a list of (B, T, K), K split over 'model'.

    Fused: one matmul over the kernels side by side. Joining happens within each shard, hence without
    communication, in the copy that casting and gathering the weights makes anyway.
    """
    if config.matmul == "fp8":
        return fp8.column(reshard(x_BTD, RESIDUAL), [w[...] for w in kernels])
    weights = [w[...].astype(x_BTD.dtype) for w in kernels]
    if config.overlap:
        return _column_rings(reshard(x_BTD, RESIDUAL), weights, config.fused)
    x_BTD = reshard(x_BTD, BATCH)  # matmuls read the whole width, the stream is split over 'model'
    weights = [reshard(w, COLUMN) for w in weights]
    if not config.fused or len(weights) == 1:
        return [matmul("btd,dk->btk", x_BTD, w, HIDDEN) for w in weights]
    joined = jax.shard_map(lambda *w: jnp.concatenate(w, 1), in_specs=COLUMN, out_specs=COLUMN)(*weights)
    y_BTK = matmul("btd,dk->btk", x_BTD, joined, HIDDEN)

    def split(y):
        widths = [w.shape[1] * y.shape[2] // joined.shape[1] for w in weights]
        return tuple(_split(y, widths, 2))

    return list(jax.shard_map(split, in_specs=HIDDEN, out_specs=HIDDEN)(y_BTK))


def row_parallel(inputs: list[jax.Array], kernels: list[jax.Array], config: ModelConfig) -> jax.Array:
    """The sum over pairs of `x @ kernel`, (B, T, K) @ (K, D) with K split over 'model': (B, T, D) as RESIDUAL.

    Fused: one matmul over the inputs side by side, which reads and writes a joined copy of them.
    """
    if config.matmul == "fp8":
        return fp8.row(inputs, kernels)
    weights = [w.astype(x.dtype) for x, w in zip(inputs, kernels, strict=True)]
    if config.overlap:
        return _row_rings(inputs, weights, config.fused)
    weights = [reshard(w, ROW) for w in weights]
    if config.fused and len(inputs) > 1:
        inputs = [jax.shard_map(lambda *x: jnp.concatenate(x, 2), in_specs=HIDDEN, out_specs=HIDDEN)(*inputs)]
        weights = [jax.shard_map(lambda *w: jnp.concatenate(w, 0), in_specs=ROW, out_specs=ROW)(*weights)]
    outputs = [matmul("btk,kd->btd", x, w, RESIDUAL) for x, w in zip(inputs, weights, strict=True)]
    return functools.reduce(jnp.add, outputs)


def sum_replicas_later(blocks):
    """The same stacked blocks, in a type whose gradients stay each replica's own until they have left the scan."""

    def defer(w: jax.Array) -> jax.Array:
        spec = jax.typeof(w).sharding.spec
        return reshard(w, P(*spec, reduced={"replica"})) if "data" in spec else w

    return jax.tree.map(defer, blocks)


def _column_rings(x_BTD: jax.Array, weights: list[jax.Array], fused: bool) -> list[jax.Array]:
    kernel = P(*KERNEL_IN, reduced={"replica"})

    def local(x_BTd, shards):
        widths = [w.shape[1] for w in shards]
        joined = ring.all_gather(jnp.concatenate(shards, 1), "data", 0)  # one ring for all
        if fused:
            return _split(ring.gather_matmul(x_BTd, [joined], "model")[0], widths, 2)
        return ring.gather_matmul(x_BTd, _split(joined, widths, 1), "model")

    rings = jax.shard_map(local, in_specs=(RESIDUAL, kernel), out_specs=HIDDEN, check_vma=False)
    return rings(x_BTD, [reshard(w, kernel) for w in weights])


def _row_rings(inputs: list[jax.Array], weights: list[jax.Array], fused: bool) -> jax.Array:
    kernel = P(*KERNEL_OUT, reduced={"replica"})

    def local(inputs, shards):
        heights = [w.shape[0] for w in shards]
        joined = ring.all_gather(jnp.concatenate(shards, 0), "data", 1)
        if fused:
            return ring.matmul_scatter([jnp.concatenate(inputs, 2)], [joined], "model")
        return ring.matmul_scatter(inputs, _split(joined, heights, 0), "model")

    rings = jax.shard_map(local, in_specs=(HIDDEN, kernel), out_specs=RESIDUAL, check_vma=False)
    return rings(inputs, [reshard(w, kernel) for w in weights])


def _split(x: jax.Array, sizes: list[int], dim: int) -> list[jax.Array]:
    """`x` cut along `dim` into parts of these sizes."""
    return jnp.split(x, [sum(sizes[:i]) for i in range(1, len(sizes))], axis=dim)
