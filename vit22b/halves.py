"""Tensor parallelism with a batch in two halves: one's sums and gathers travel while the other is computed.

Each half goes through the layers by itself, and barriers fix the order: a half's matmuls begin when the other's have
ended, and what those gave is summed and normed, and gathered for their next turn, meanwhile. Without barriers XLA's
scheduler for GPUs takes one half through several layers before the other, with nothing beside its communication; a
scheduler that may run collectives beside matmuls (XLA's latency hiding) must still be at work. Backward the order is
reversed, as the barriers are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from vit22b.layers import Sublayer
from vit22b.model_config import ModelConfig


def take_turns(config: ModelConfig, batch: int) -> bool:
    """Whether so many images take turns on the mesh in force: where there is something to hide, and each device has
    as many in either half.
    """
    sizes = get_abstract_mesh().shape
    return config.overlap == "halves" and sizes["model"] > 1 and batch % (2 * math.prod(sizes.values())) == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Halves:
    """The residual stream (B, T, D) as two of (B / 2, T, D), and what has yet to be added to one of them."""

    streams: list[jax.Array]
    waiting: tuple[int, Sublayer, jax.Array] | None = None

    def through(self, first: list[Sublayer], second: list[Sublayer]) -> None:
        """Takes each half through its own form of the same sublayers."""
        for pair in zip(first, second, strict=True):
            kernels = pair[0].kernels()  # once for both
            for half, sublayer in enumerate(pair):
                self.streams[half], (normed,) = sublayer.read(self.streams[half])
                if self.waiting is not None:
                    other, their, sums = self.waiting
                    normed, sums = jax.lax.optimization_barrier((normed, sums))
                    self._add(other, their, sums)
                self.waiting = half, sublayer, sublayer.compute([normed], kernels)

    def settle(self) -> None:
        """Adds what waits."""
        if self.waiting is not None:
            self._add(*self.waiting)
            self.waiting = None

    def joined(self) -> jax.Array:
        """The whole stream, (B, T, D), in the order that it had before `split`."""
        self.settle()
        x, spec = jnp.stack(self.streams, 1), jax.typeof(self.streams[0]).sharding.spec
        return jax.lax.reshape(x, (2 * x.shape[0], *x.shape[2:]), out_sharding=spec)

    def _add(self, half: int, sublayer: Sublayer, sums: jax.Array) -> None:
        self.streams[half] = sublayer.add(self.streams[half], sums)


def split(x: jax.Array, axis: int = 0) -> list[jax.Array]:
    """Two arrays, of every other image each, which lie as `x` does: none moves to another device."""
    spec = jax.typeof(x).sharding.spec
    shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    pairs = jax.lax.reshape(x, shape, out_sharding=P(*spec[: axis + 1], None, *spec[axis + 1 :]))
    return [half.squeeze(axis + 1) for half in jax.lax.split(pairs, [1, 1], axis + 1)]
