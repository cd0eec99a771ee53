"""What tells a model from every other: the values of its parameters, and what else decides what it computes."""

import hashlib

import jax
import jax.numpy as jnp

from vit22b.model import ViT
from vit22b.names import named_leaves

# Fields of `ModelConfig` that change speed and rounding at most, or only what a model starts from.
COMPUTED = ("attention", "kernels", "remat", "overlap", "scan_unroll", "stochastic_depth", "init", "head_bias")


def digest(model: ViT) -> str:
    """A hash of all parameters as they are on the devices, however they are sharded."""
    found = [(name, leaf.shape, leaf.dtype.name) for name, leaf in named_leaves(model).items()]
    values = [int(x) for x in jax.tree.leaves(_checksums(model))]
    return hashlib.sha256(repr((found, values)).encode()).hexdigest()[:16]


@jax.jit
def _checksums(model: ViT) -> ViT:
    return jax.tree.map(_checksum, model)


def _checksum(x: jax.Array) -> jax.Array:
    """The sum of all elements' bits, each times an odd number of its place, modulo 2^32: no order changes it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for dim in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim, out_sharding=jax.typeof(bits).sharding)
        place = (place ^ index) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((bits ^ (bits >> 13)) * (2 * place + 1), dtype=jnp.uint32)
