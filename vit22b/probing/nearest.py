"""Weighted nearest neighbours, as DINO evaluates features [Caron 2021, appendix]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b.config import check
from vit22b.probing.rows import Features, all_rows, batches
from vit22b.sharding import BATCH

QUERIES = 256  # at a time
BLOCK = 16_384  # training rows of which the nearest are found at a time


def votes(
    train: Features,
    feature: str,
    rows: np.ndarray,
    queries: Features,
    query_rows: np.ndarray,
    neighbours: tuple[int, ...],
    temperature: float,
) -> np.ndarray:
    """The share of the votes that each class gets, (len(neighbours), M, C), fp32, for M queries.

    Neighbours are those of the highest cosine similarity s, and vote for their class with weight exp(s / temperature).
    The training rows lie on all devices together, in their own dtype. Raises `RecipeError` where they are fewer than
    the neighbours.
    """
    most, num_classes = max(neighbours), train.num_classes
    check(most <= len(rows), "--neighbours", most, f"there are {len(rows)} training images; give at most as many")
    column = train.columns[feature]
    x_ND = _unit(all_rows(column, rows, column.dtype))
    labels_N = all_rows(train.labels, rows, np.dtype(np.int32))
    found = []
    for batch in batches({"x": queries.columns[feature]}, query_rows, QUERIES):
        query_QD = reshard(_unit(batch["x"]), P(None, None))
        shares = _votes(x_ND, labels_N, query_QD, len(rows), neighbours, temperature, num_classes)
        found.append(np.asarray(shares))
    return np.concatenate(found, axis=1)[:, : len(query_rows)]


@jax.jit
def _unit(x: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("count", "neighbours", "temperature", "num_classes"))
def _votes(
    x_ND: jax.Array,
    labels_N: jax.Array,
    query_QD: jax.Array,
    count: int,
    neighbours: tuple[int, ...],
    temperature: float,
    num_classes: int,
) -> jax.Array:
    """(K, Q, C), replicated; rows from `count` on fill up, and are nobody's neighbours."""
    axes = BATCH[0]
    most = max(neighbours)

    def nearest_here(x: jax.Array, labels: jax.Array, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest of this device's rows, then of all devices'; similarities and labels (Q, most)."""
        here = len(x)
        place = jax.lax.axis_index(axes) * here + jnp.arange(here)
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        best, of_best = jnp.full((len(query), 0), -jnp.inf), jnp.zeros((len(query), 0), jnp.int32)
        for start in range(0, here, BLOCK):
            block = slice(start, start + BLOCK)
            similarity = jnp.einsum("qd,nd->qn", query, x[block], precision=exact, preferred_element_type=jnp.float32)
            similarity = jnp.where(place[block] < count, similarity, -jnp.inf)
            theirs = jnp.broadcast_to(labels[block], similarity.shape)
            best = jnp.concatenate([best, similarity], axis=1)
            best, of_best = _best(best, jnp.concatenate([of_best, theirs], axis=1), most)
        best, of_best = (jax.lax.all_gather(each, axes, axis=1, tiled=True) for each in (best, of_best))
        return _best(best, of_best, most)

    similarity, labels = jax.shard_map(
        nearest_here, in_specs=(BATCH, BATCH, P()), out_specs=(P(), P()), check_vma=False
    )(x_ND, labels_N, query_QD)
    # Relative to the nearest, so that nothing overflows.
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    classes = jax.nn.one_hot(labels, num_classes)
    shares = [jnp.einsum("qk,qkc->qc", weight[:, :k], classes[:, :k]) for k in neighbours]
    return jnp.stack([share / jnp.sum(share, axis=1, keepdims=True) for share in shares])


def _best(similarity: jax.Array, labels: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    found, where = jax.lax.top_k(similarity, min(most, similarity.shape[1]))
    return found, jnp.take_along_axis(labels, where, axis=1)
