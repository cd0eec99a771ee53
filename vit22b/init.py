"""Initial weights: the papers' defaults, and mimetic initialization.

Kernels are (in, out), applied as `x @ kernel`. All values are fp32.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

REPLICATED = P(None, None)


def xavier(key: jax.Array, shape: tuple[int, int], spec: P) -> jax.Array:
    """Uniform with variance 2 / (in + out) [Glorot 2010], as big_vision's ViTs start."""
    limit = math.sqrt(6 / (shape[0] + shape[1]))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit, out_sharding=spec)


def normal(key: jax.Array, shape: tuple[int, ...], spec: P, std: float) -> jax.Array:
    """Normal with standard deviation `std`."""
    return std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], spec: P, std: float = 0.02) -> jax.Array:
    """Normal cut at two standard deviations, not rescaled; 0.02 is DeiT's and timm's choice."""
    return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32, out_sharding=spec)


def mimetic_query_key(
    key: jax.Array, width: int, num_heads: int, alpha: float = 0.7, beta: float = 0.7
) -> tuple[jax.Array, jax.Array]:
    """Query and key kernels, each (width, width), with Q_h K_h^T ~ alpha Z + beta I in every head h.

    Z has independent N(0, 1/width) entries, drawn per head. A head has `width / num_heads` columns, so
    its product is the best approximation of that rank [Trockman & Kolter 2023, section 3].
    """
    head_dim = width // num_heads

    def one_head(head_key):  # in turn, not batched: jaxlib's batched LAPACK deadlocks with many CPU devices
        left, right = _factor(alpha * _noise(head_key, width) + beta * jnp.eye(width))
        return left[:, :head_dim], right[:, :head_dim]

    query, kernel_key = jax.lax.map(one_head, jax.random.split(key, num_heads))  # N D H
    return tuple(w.transpose(1, 0, 2).reshape(width, width) for w in (query, kernel_key))


def mimetic_value_out(key: jax.Array, width: int, alpha: float = 0.4, beta: float = 0.4) -> tuple[jax.Array, jax.Array]:
    """Value and output kernels, each (width, width), with V O = alpha Z - beta I exactly.

    One full-rank target per layer; the heads are consecutive blocks of V's columns and O's rows
    [Trockman & Kolter 2023, section 3].
    """
    left, right = _factor(alpha * _noise(key, width) - beta * jnp.eye(width))
    return left, right.T


def _noise(key: jax.Array, width: int) -> jax.Array:
    return jax.random.normal(key, (width, width), jnp.float32) / math.sqrt(width)


def _factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Balanced factors with `left @ right.T == matrix`, columns in order of falling singular value."""
    u, s, vt = jnp.linalg.svd(matrix)
    return u * jnp.sqrt(s), vt.T * jnp.sqrt(s)
