"""The one matmul of the model, and the dtypes it computes in."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "fp8": jnp.bfloat16}  # fp8 itself: vit22b/fp8.py


def matmul(equation: str, x: jax.Array, w: jax.Array, out_sharding: P | None = None) -> jax.Array:
    """einsum in the operands' dtype; fp32 means fp32, also where hardware would round its inputs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision, out_sharding=out_sharding)
