"""Linear heads in closed form: ridge regression on all examples, and big_vision's on few.

Both regress targets of 1 for the image's class and -1 for the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, get_mesh
from jax.sharding import PartitionSpec as P

from vit22b.errors import check
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features, batches

BATCH_SIZE = 4096  # rows that are added up at a time
BIAS = 100.0  # big_vision's constant feature: so large that its weight, the intercept, is hardly penalised
FEW_SHOT_L2 = 2.0**10


def ridge(features: Features, feature: str, rows: np.ndarray, penalties: tuple[float, ...]) -> Heads:
    """Heads that minimise sum |targets - x kernel - bias|^2 + penalty |kernel|^2, a head for each penalty.

    One pass over the rows sums up second moments on the devices, in fp32; one eigendecomposition in fp64 on the host
    then serves all penalties. Raises `RecipeError` unless these are positive.
    """
    check(min(penalties) > 0, "--l2", min(penalties), "must be positive")
    column, count = features.columns[feature], len(rows)
    width, num_classes = column.shape[1], features.num_classes
    # Moments are taken about a point near the mean: about 0, an offset would leave few digits to the variance.
    near_D = column[rows[:: -(-count // 1024)]].astype(np.float64).mean(axis=0).astype(np.float32)
    replicated = NamedSharding(get_mesh(), P())
    total, excess = (jnp.zeros((width, width + num_classes), device=replicated) for _ in range(2))
    for batch in batches({"x": column, "label": features.labels}, rows, BATCH_SIZE):
        total, excess = _add(total, excess, batch["x"], batch["label"], batch["mask"], near_D)
    sums = np.asarray(total, np.float64) - np.asarray(excess, np.float64)

    products_DD, class_sums_DC = sums[:, :width], sums[:, width:]
    counts_C = np.bincount(features.labels[rows], minlength=num_classes)
    rest_D = class_sums_DC.sum(axis=1) / count  # of the mean
    products_DD = products_DD - count * np.outer(rest_D, rest_D)
    targets_DC = 2 * (class_sums_DC - np.outer(rest_D, counts_C))  # products of centred features with targets
    values_D, vectors_DD = np.linalg.eigh(products_DD)
    rotated_DC = vectors_DD.T @ targets_DC
    # Features that do not vary along a direction have no weight there. What is summed up is not exactly 0 but
    # rounding errors, which a small penalty would let grow.
    rounding_D = np.finfo(np.float32).eps * np.sqrt(width) * (np.diag(products_DD) @ vectors_DD**2)
    rotated_DC[values_D <= rounding_D] = 0
    values_D = np.maximum(values_D, 0)
    kernel_HDC = np.stack([vectors_DD @ (rotated_DC / (values_D + l2)[:, None]) for l2 in penalties])
    settings: list[dict[str, object]] = [{"feature": feature, "l2": l2} for l2 in penalties]
    return _heads(feature, settings, kernel_HDC, near_D + rest_D, 2 * counts_C / count - 1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(
    total: jax.Array, excess: jax.Array, x_BD: jax.Array, labels_B: jax.Array, mask_B: jax.Array, near_D: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Adds a batch's products of features about `near_D` with one another and with classes: (D, D + C), fp32.

    `excess` is what rounding has added to `total` [Kahan 1965]: thousands of batches lose no digits.
    """
    x_BD = (x_BD.astype(jnp.float32) - near_D) * mask_B[:, None]
    classes_BC = jax.nn.one_hot(labels_B, total.shape[1] - total.shape[0])
    products = jnp.einsum(
        "bd,be->de",
        x_BD,
        jnp.concatenate([x_BD, classes_BC], axis=1),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=P(),
    )
    correct = products - excess
    new = total + correct
    return new, (new - total) - correct


def few_shot(features: Features, feature: str, rows: np.ndarray, shots: int, seed: int) -> Heads:
    """A head from `shots` examples of each class, by the protocol of big_vision's fewshot_lsr.

    A class that has fewer gives all. Features are standardised by the examples' own mean and deviation, get a constant
    one of 100, and are regressed with a penalty of 2^10 on all weights, in fp64 on the host. The examples of a seed are
    among those of more shots.
    """
    rng, chosen, labels = np.random.default_rng(seed), [], features.labels[rows]
    for label in np.unique(labels):
        members = rows[labels == label]
        chosen.append(rng.permutation(members)[:shots])
    rows = np.concatenate(chosen)
    x_ND = features.columns[feature][rows].astype(np.float64)
    mean_D, deviation_D = x_ND.mean(axis=0), x_ND.std(axis=0) + 1e-5
    x_ND = np.column_stack([(x_ND - mean_D) / deviation_D, np.full(len(rows), BIAS)])
    targets_NC = np.where(features.labels[rows][:, None] == np.arange(features.num_classes), 1.0, -1.0)
    count, width = x_ND.shape
    if count >= width:
        solved = np.linalg.solve(x_ND.T @ x_ND + FEW_SHOT_L2 * np.eye(width), x_ND.T @ targets_NC)
    else:  # the same by the smaller matrix
        solved = x_ND.T @ np.linalg.solve(x_ND @ x_ND.T + FEW_SHOT_L2 * np.eye(count), targets_NC)
    settings: list[dict[str, object]] = [{"feature": feature, "shots": shots, "seed": seed}]
    kernel_HDC = (solved[:-1] / deviation_D[:, None])[None]
    return _heads(feature, settings, kernel_HDC, mean_D, BIAS * solved[-1])


def _heads(
    feature: str,
    settings: list[dict[str, object]],
    kernel_HDC: np.ndarray,
    mean_D: np.ndarray,
    intercept_C: np.ndarray,
) -> Heads:
    """Heads for features as they are, of kernels for features less their mean."""
    kernel_HDC = kernel_HDC.astype(np.float32)
    bias_HC = intercept_C - mean_D @ kernel_HDC.astype(np.float64)  # of the rounded kernel: exact at the mean
    replicated = NamedSharding(get_mesh(), P())
    placed = (jax.make_array_from_process_local_data(replicated, x.astype(np.float32)) for x in (kernel_HDC, bias_HC))
    return Heads(feature, settings, *placed)
