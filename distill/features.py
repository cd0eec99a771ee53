"""Teachers' features: on the students' grid, and standardised by their mean and deviation over some batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard

from distill.config import DistillRecipe
from vit22b.model import Output
from vit22b.model_config import ModelConfig
from vit22b.sharding import BATCH, on_batch


def aligned(output: Output, config: ModelConfig, recipe: DistillRecipe) -> dict[str, jax.Array]:
    """A teacher's 'summary' (B, K), and its 'patches' (B, T, K) on the student's grid, bilinearly; fp32."""
    num_prefix = config.class_token + config.num_registers
    patches = reshard(output.tokens, BATCH)[:, num_prefix:].astype(jnp.float32)
    _, length, width = patches.shape
    side, grid = math.isqrt(length), recipe.model.grid

    def local(x: jax.Array) -> jax.Array:
        square = x.reshape(x.shape[0], side, side, width)
        square = jax.image.resize(square, (x.shape[0], grid, grid, width), "linear", antialias=True)
        return square.reshape(x.shape[0], grid**2, width)

    if side != grid:
        patches = on_batch(local)(patches)
    return {"summary": output.pooled, "patches": patches}


@dataclasses.dataclass
class Moments:
    """Of each feature, over what has been added: batches are joined as in [Chan 1979], without cancellation."""

    count: int = 0
    mean: np.ndarray | float = 0.0  # (K,), fp64
    squares: np.ndarray | float = 0.0  # (K,): the sum of squared differences from the mean

    def add(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total, apart = self.count + count, np.float64(mean) - self.mean
        self.squares += np.float64(squares) + np.square(apart) * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (K,), fp32; 1 for what does not vary."""
        deviation = np.sqrt(np.asarray(self.squares) / self.count)
        return np.asarray(self.mean, np.float32), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)


def batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `Moments.add` takes beside the count, of features (..., K): (K,) each, fp32."""
    dims = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axis=dims)
    return mean, jnp.sum(jnp.square(x - mean), axis=dims)


def as_they_are(config: ModelConfig) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Statistics that change nothing."""
    return {name: (jnp.zeros(config.width), jnp.ones(config.width)) for name in ("summary", "patches")}
