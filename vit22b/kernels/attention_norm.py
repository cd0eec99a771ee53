"""The norm of queries and keys within attention's forward pass: x / sqrt(mean(x^2) + epsilon) * scale over a head.

A warpgroup takes 64 rows of a head at a time where they were copied to in shared memory, in registers, where they are
spread as the results of matmuls are, and puts the normalised ones there, rounded to bf16 as `norms.norm` rounds them.
From there they are also copied to device memory: the backward pass takes them as if the norm had been a kernel before.
(One that normalised by itself and found the gradients of the norm took longer than its parts; see BENCHMARKS.md.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vit22b.kernels import hopper

QUERY, KEY = range(2)


class Norm(NamedTuple):
    """What a kernel knows of it."""

    scales_ref: Any  # (2, columns) fp32: of queries and keys
    head_dim: int
    results: tuple[Any, Any]  # in device memory, like queries and keys
    ready_barrier: Any
    epsilon: float

    def apply(self, x: jax.Array, which: int) -> jax.Array:
        """64 rows, (64, columns), 0 in columns that the head has not; normalised, bf16."""
        x = x.astype(jnp.float32)
        inverse = lax.rsqrt((x * x).sum(axis=1) * (1 / self.head_dim) + self.epsilon)
        # From device memory, or a cache: there is no room for scales in shared memory, nor in registers.
        ref, layout = self.scales_ref.at[which, pl.ds(0, x.shape[1])], plgpu.Layout.WGMMA.reduce(0)
        scale = plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # as in hopper
        return (x * hopper.along_columns(inverse, x.shape) * hopper.along_rows(scale, x.shape)).astype(jnp.bfloat16)


def with_norm(kernel: Callable, head_dim: int, epsilon: float) -> Callable:
    """A kernel that takes a `norm`, as one of more arrays: scales, the last to be read; normalised queries and keys,
    the last to be written; and `ready_barrier`, the last of its scratch.
    """

    def run(q_ref, k_ref, v_ref, scales_ref, out_ref, lse_ref, queries_ref, keys_ref, *scratch, interpret: bool):
        *others, ready_barrier = scratch
        norm = Norm(scales_ref, head_dim, (queries_ref, keys_ref), ready_barrier, epsilon)
        kernel(q_ref, k_ref, v_ref, out_ref, lse_ref, *others, norm=norm, interpret=interpret)

    return run
