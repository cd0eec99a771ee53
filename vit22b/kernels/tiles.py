"""What the kernels share: which arrays they apply to, tiles of matrices, loads, stores and the call itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def fits(x: jax.Array) -> bool:
    """Whether the kernels apply to a device's part of `x`: bf16, loads of 16 bytes, and places that int32 can count."""
    shape = jax.typeof(x).sharding.shard_shape(x.shape)
    return x.dtype == jnp.bfloat16 and shape[-1] % 8 == 0 and 0 < math.prod(shape) < 2**31


def tile(row: Any, column: Any, tile_shape: tuple[int, int], shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Row numbers (R, 1) and column numbers (1, C) of a tile of a matrix, and the mask of those that exist."""
    rows = row * tile_shape[0] + jnp.arange(tile_shape[0])[:, None]
    columns = column * tile_shape[1] + jnp.arange(tile_shape[1])[None, :]
    return rows, columns, (rows < shape[0]) & (columns < shape[1])


def load(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    """A tile as fp32, zero where the mask is false."""
    return triton.load(ref.at[rows, columns], mask=mask, other=0.0).astype(jnp.float32)


def load_vector(ref: Any, columns: jax.Array) -> jax.Array:
    """Part of a vector, zero beyond its end."""
    return triton.load(ref.at[columns], mask=columns < ref.shape[0], other=0.0)


def store(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array, value: jax.Array) -> None:
    """A tile of a result, rounded to its dtype."""
    triton.store(ref.at[rows, columns], value.astype(ref.dtype), mask=mask)


def call(kernel: Callable, grid: tuple[int, ...], out_shape: Any, name: str, num_warps: int) -> Callable:
    """The kernel as a function of arrays; interpreted where there is no GPU."""
    interpret = jax.default_backend() != "gpu"
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )
