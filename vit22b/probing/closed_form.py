"""Linear heads in closed form: ridge regression on all examples, and big_vision's on few.

Both regress targets of 1 for the image's class and -1 for the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vit22b.config import check
from vit22b.probing.heads import BATCH_SIZE, Heads
from vit22b.probing.rows import Features, batches

BIAS = 100.0  # big_vision's constant feature: so large that its weight, the intercept, is hardly penalised
FEW_SHOT_L2 = 2.0**10


def ridge(features: Features, feature: str, rows: np.ndarray, penalties: tuple[float, ...]) -> Heads:
    """Heads that minimise sum |targets - x kernel - bias|^2 + penalty |kernel|^2, a head for each penalty.

    Moments are summed up on the devices, in fp32, about the mean; one eigendecomposition in fp64 on the host then
    serves all penalties.
    """
    columns = {"x": features.columns[feature], "label": features.labels}
    num_classes = features.num_classes
    total = np.zeros(features.columns[feature].shape[1])
    for batch in batches(columns, rows, BATCH_SIZE):
        total += np.asarray(_sum(batch["x"], batch["mask"]), np.float64)
    mean_D = total / len(rows)
    products_DD, targets_DC = np.zeros((len(total), len(total))), np.zeros((len(total), num_classes))
    for batch in batches(columns, rows, BATCH_SIZE):
        moments = _moments(batch["x"], batch["label"], batch["mask"], jnp.asarray(mean_D, jnp.float32), num_classes)
        products_DD += np.asarray(moments[0], np.float64)
        targets_DC += np.asarray(moments[1], np.float64)
    counts_C = np.bincount(features.labels[rows], minlength=num_classes)
    mean_target_C = 2 * counts_C / len(rows) - 1
    values_D, vectors_DD = np.linalg.eigh(products_DD)
    projected_DC = vectors_DD.T @ targets_DC
    kernels = [vectors_DD @ (projected_DC / (np.maximum(values_D, 0) + l2)[:, None]) for l2 in penalties]
    biases = [mean_target_C - mean_D @ kernel for kernel in kernels]
    settings: list[dict[str, object]] = [{"feature": feature, "l2": l2} for l2 in penalties]
    return Heads("ridge", feature, settings, *(jnp.asarray(np.stack(x), jnp.float32) for x in (kernels, biases)))


@jax.jit
def _sum(x_BD: jax.Array, mask_B: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bd,b->d", x_BD.astype(jnp.float32), mask_B, precision=jax.lax.Precision.HIGHEST, out_sharding=P()
    )


@functools.partial(jax.jit, static_argnames="num_classes")
def _moments(
    x_BD: jax.Array, labels_B: jax.Array, mask_B: jax.Array, mean_D: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Sums of products of centred features with one another, (D, D), and with targets, (D, C)."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, out_sharding=P())
    centred_BD = (x_BD.astype(jnp.float32) - mean_D) * mask_B[:, None]
    targets_BC = 2 * jax.nn.one_hot(labels_B, num_classes) - 1
    return exact("bd,be->de", centred_BD, centred_BD), exact("bd,bc->dc", centred_BD, targets_BC)


def few_shot(features: Features, feature: str, rows: np.ndarray, shots: int, seed: int) -> Heads:
    """A head from `shots` examples of each class, by the protocol of big_vision's fewshot_lsr.

    Features are standardised by these examples' own mean and deviation, get a constant one of 100, and are regressed
    with a penalty of 2^10, in fp64 on the host. Raises `RecipeError` where a class has too few.
    """
    rng, chosen = np.random.default_rng(seed), []
    for label in np.unique(features.labels[rows]):
        members = rows[features.labels[rows] == label]
        check(len(members) >= shots, "--shots", shots, f"class {label} has {len(members)} images; give at most as many")
        chosen.append(rng.permutation(members)[:shots])
    rows = np.concatenate(chosen)
    x_ND = np.asarray(features.columns[feature][rows], np.float64)
    mean_D, deviation_D = x_ND.mean(axis=0), x_ND.std(axis=0) + 1e-5
    x_ND = np.column_stack([(x_ND - mean_D) / deviation_D, np.full(len(rows), BIAS)])
    targets_NC = np.where(features.labels[rows][:, None] == np.arange(features.num_classes), 1.0, -1.0)
    count, width = x_ND.shape
    if count >= width:
        solved = np.linalg.solve(x_ND.T @ x_ND + FEW_SHOT_L2 * np.eye(width), x_ND.T @ targets_NC)
    else:  # the same by the smaller matrix
        solved = x_ND.T @ np.linalg.solve(x_ND @ x_ND.T + FEW_SHOT_L2 * np.eye(count), targets_NC)
    kernel_DC = solved[:-1] / deviation_D[:, None]
    bias_C = BIAS * solved[-1] - mean_D @ kernel_DC
    settings: list[dict[str, object]] = [{"feature": feature, "shots": shots, "seed": seed}]
    return Heads("few_shot", feature, settings, *(jnp.asarray(x[None], jnp.float32) for x in (kernel_DC, bias_C)))
