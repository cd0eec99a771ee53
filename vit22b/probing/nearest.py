"""Weighted nearest neighbours, as DINO evaluates features [Caron 2021, section 4.1]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b.errors import check
from vit22b.probing.rows import Features, all_rows, batches
from vit22b.sharding import BATCH

QUERIES = 1024  # at a time
BLOCK = 65_536  # training rows of a device that these are compared with at a time
GROUP = 8  # similarities of which only the highest is sorted at first


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
    most = max(neighbours)
    check(most <= len(rows), "--neighbours", most, f"there are {len(rows)} training images; give at most as many")
    column = train.columns[feature]
    x_ND = all_rows(column, rows, column.dtype)
    labels_N = all_rows(train.labels, rows, np.dtype(np.int32))
    # Every batch is under way before the first is waited for.
    found = [
        _nearest(x_ND, labels_N, len(rows), batch["x"], most)
        for batch in batches({"x": queries.columns[feature]}, query_rows, QUERIES)
    ]
    shares = [_shares(np.asarray(s), np.asarray(y), neighbours, temperature, train.num_classes) for s, y in found]
    return np.concatenate(shares, axis=1)[:, : len(query_rows)]


@functools.partial(jax.jit, static_argnames=("count", "most"))
def _nearest(
    x_ND: jax.Array, labels_N: jax.Array, count: int, query_QD: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """Similarities and labels of the `most` nearest, in this order: (Q, most), replicated.

    Rows from `count` on fill up and are nobody's neighbours; of equally near ones the earlier row is nearer.
    """
    axes = BATCH[0]
    exact = jax.lax.Precision.HIGHEST if x_ND.dtype == jnp.float32 else None

    def on_device(x_nD: jax.Array, labels_n: jax.Array, query_QD: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = len(x_nD)
        size = min(BLOCK, here)
        first = jax.lax.axis_index(axes) * here

        def of_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
            start = jnp.minimum(block * size, here - size)  # the last one begins among rows of the one before
            x_BD = jax.lax.dynamic_slice_in_dim(x_nD, start, size)
            place_B = start + jnp.arange(size)
            similarity_QB = jnp.einsum("qd,bd->qb", query_QD, x_BD, precision=exact, preferred_element_type=jnp.float32)
            # Scaled afterwards: unit vectors would have to be rounded to the features' dtype.
            similarity_QB *= _inverse_length(query_QD)[:, None] * _inverse_length(x_BD)
            valid_B = (place_B >= block * size) & (first + place_B < count)
            best_QK, where_QK = top_k(jnp.where(valid_B, similarity_QB, -jnp.inf), min(most, size))
            return best_QK, labels_n[start + where_QK]

        blocks = jax.lax.map(of_block, jnp.arange(-(-here // size)))
        best = _merge(most, *(jnp.moveaxis(each, 0, 1).reshape(len(query_QD), -1) for each in blocks))
        return _merge(most, *(jax.lax.all_gather(each, axes, axis=1, tiled=True) for each in best))

    run = jax.shard_map(on_device, in_specs=(BATCH, BATCH, P()), out_specs=(P(), P()), check_vma=False)
    return run(x_ND, labels_N, reshard(query_QD, P()))


def _inverse_length(x_BD: jax.Array) -> jax.Array:
    length_B = jnp.linalg.norm(x_BD.astype(jnp.float32), axis=1)
    return 1 / jnp.maximum(length_B, 1e-12)


def _merge(most: int, similarity: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    best, where = jax.lax.top_k(similarity, min(most, similarity.shape[1]))
    return best, jnp.take_along_axis(labels, where, axis=1)


def top_k(x_QN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """What `jax.lax.top_k` gives, for k much smaller than N, with an eighth to sort.

    The k highest lie in the k groups of neighbouring numbers whose maxima are highest.
    """
    filled = jnp.pad(x_QN, ((0, 0), (0, -x_QN.shape[1] % GROUP)), constant_values=-jnp.inf)
    groups_QMG = filled.reshape(len(x_QN), -1, GROUP)
    _, chosen_QK = jax.lax.top_k(jnp.max(groups_QMG, axis=2), min(k, groups_QMG.shape[1]))
    chosen_QK = jnp.sort(chosen_QK, axis=1)  # so that of equal numbers the first still wins
    candidates_QKG = jnp.take_along_axis(groups_QMG, chosen_QK[:, :, None], axis=1)
    best, where = jax.lax.top_k(candidates_QKG.reshape(len(x_QN), -1), k)
    group, place = where // GROUP, where % GROUP
    return best, jnp.take_along_axis(chosen_QK, group, axis=1) * GROUP + place


def _shares(
    similarity_QK: np.ndarray, labels_QK: np.ndarray, neighbours: tuple[int, ...], temperature: float, num_classes: int
) -> np.ndarray:
    """(len(neighbours), Q, C), fp32."""
    relative_QK = similarity_QK.astype(np.float64) - similarity_QK[:, :1]  # to the nearest: nothing overflows
    weights_QK = np.exp(relative_QK / temperature)
    cells_QK = np.arange(len(labels_QK))[:, None] * num_classes + labels_QK
    shares = np.empty((len(neighbours), len(labels_QK), num_classes), np.float32)
    for share_QC, k in zip(shares, neighbours, strict=True):
        summed = np.bincount(cells_QK[:, :k].ravel(), weights_QK[:, :k].ravel(), minlength=share_QC.size)
        share_QC[:] = summed.reshape(share_QC.shape) / weights_QK[:, :k].sum(axis=1, keepdims=True)
    return shares
