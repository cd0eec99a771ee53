"""Multinomial logistic regression with an L2 penalty, to scikit-learn's optimum, by L-BFGS.

The optimum does not depend on the coordinates in which it is sought, only the number of iterations does. So features
are centred, for which the unpenalised intercept makes up. And kernels are written in the principal directions of the
features, each stretched half of the way (in logarithms) to where the curvature at kernel 0 would be the same along all;
not all of the way, since the curvature at the optimum is another one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from vit22b.errors import check
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features, all_rows
from vit22b.sharding import BATCH

CHUNK = 2**27  # elements of features, and of logits, that a device works on at a time
MEMORY = 10  # steps from which L-BFGS estimates the curvature, as in scikit-learn
PATIENCE = 20  # iterations without progress after which fp32 is taken to allow none


def fit(
    features: Features,
    feature: str,
    rows: np.ndarray,
    inverse_penalties: tuple[float, ...],
    tolerance: float,
    max_iterations: int,
) -> tuple[Heads, np.ndarray, np.ndarray]:
    """Heads that minimise C sum(losses) + |kernel|^2 / 2, a head for each C of `inverse_penalties`.

    A head is done where no derivative of that, divided by C and the number of rows, exceeds `tolerance` (scikit-learn's
    `tol`, but with respect to centred features); after `max_iterations`; or where fp32 allows no progress. Also
    returned are each head's iterations, (H,) int32, and its largest derivative at the end, (H,) fp32. Heads are trained
    one after the other, each from 0, so that none depends on which others there are. The rows, (M, D), bf16 or fp32,
    lie on all devices together in their own dtype; arithmetic is fp32.

    C is scikit-learn's. Of two classes with rows it penalises a single kernel, the difference of the two here, which
    costs twice what these do: C is halved to make up. It leaves out classes without rows; here, their logits fall until
    they have no probability left.

    Raises `RecipeError` where a C is not positive.
    """
    ok = all(0 < c < math.inf for c in inverse_penalties)
    check(ok, "--c", inverse_penalties, "must be positive")
    column = features.columns[feature]
    x_ND = all_rows(column, rows, column.dtype)
    labels_N = all_rows(features.labels, rows, np.dtype(np.int32))
    c_H = np.array(inverse_penalties, np.float32) / (2 if len(np.unique(features.labels[rows])) == 2 else 1)
    with jax.default_matmul_precision("highest"):  # products of less precision have another optimum
        kernel_HDC, bias_HC, iterations_H, derivative_H = _fit(
            x_ND, labels_N, len(rows), c_H, tolerance, max_iterations, features.num_classes
        )
    settings: list[dict[str, object]] = [{"feature": feature, "c": c} for c in inverse_penalties]
    heads = Heads(feature, settings, kernel_HDC, bias_HC)
    return heads, np.asarray(iterations_H), np.asarray(derivative_H)


@functools.partial(jax.jit, static_argnames="num_classes")
def _fit(
    x_ND: jax.Array,
    labels_N: jax.Array,
    count: int,
    c_H: jax.Array,
    tolerance: float,
    max_iterations: int,
    num_classes: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Kernels, biases, iterations, largest derivatives; rows from `count` on fill up."""

    def mean(function: Callable, *replicated: jax.Array) -> Any:
        return _mean(function, x_ND, labels_N, count, num_classes, *replicated)

    width = x_ND.shape[1]
    mean_D = mean(lambda x_BD, labels_B, mask_B: mask_B @ x_BD)
    variance_D, directions_DD = jnp.linalg.eigh(mean(_products, mean_D))

    def train(c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        penalty = 1 / (c * count)
        # Along a direction, the curvature at kernel 0 is about variance / classes + penalty. The bias is the kernel of
        # a feature that is always 1, without a penalty.
        stretch_D = (jnp.maximum(variance_D, 0) / num_classes + penalty) ** -0.25
        stretch = num_classes**0.25

        def head(point):
            return directions_DD @ (stretch_D[:, None] * point[0]), stretch * point[1]

        def derivatives(gradient):
            """With respect to the head, from those with respect to the point."""
            return directions_DD @ (gradient[0] / stretch_D[:, None]), gradient[1] / stretch

        def evaluate(point):
            kernel_DC, bias_C = head(point)
            loss, of_kernel_DC, of_bias_C = mean(_loss, mean_D, kernel_DC, bias_C)
            of_kernel_DC += penalty * kernel_DC
            gradient = stretch_D[:, None] * (directions_DD.T @ of_kernel_DC), stretch * of_bias_C
            return loss + penalty * jnp.sum(kernel_DC**2) / 2, gradient

        start = jnp.zeros((width, num_classes)), jnp.zeros(num_classes)
        point, iterations, derivative = _minimise(evaluate, start, derivatives, tolerance, max_iterations)
        kernel_DC, bias_C = head(point)
        return kernel_DC, bias_C - mean_D @ kernel_DC, iterations, derivative

    return jax.lax.map(train, c_H)


def _minimise(
    evaluate: Callable, start: Any, derivatives: Callable, tolerance: float, max_iterations: int
) -> tuple[Any, jax.Array, jax.Array]:
    """The last point, the iterations, and the largest absolute value of `derivatives(gradient)` there.

    `evaluate(point)` gives (value, gradient), of which `derivatives` makes what `tolerance` applies to.
    """
    # JAX's own differentiation would keep the logits of all rows.
    objective = jax.custom_vjp(lambda point: evaluate(point)[0])
    objective.defvjp(evaluate, lambda gradient, scale: (jax.tree.map(lambda x: scale * x, gradient),))
    # Where values no longer differ in fp32, its line search goes on by slopes [Hager 2006, Algorithm 851].
    optimizer = optax.lbfgs(memory_size=MEMORY)

    def largest(gradient: Any) -> jax.Array:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in derivatives(gradient)]))

    def going(carry: tuple) -> jax.Array:
        _, _, _, _, derivative, iteration, _, _, stale = carry
        return (derivative > tolerance) & (iteration < max_iterations) & (stale < PATIENCE)

    def iterate(carry: tuple) -> tuple:
        point, state, value, gradient, _, iteration, least_value, least_derivative, stale = carry
        update, state = optimizer.update(gradient, state, point, value=value, grad=gradient, value_fn=objective)
        point = optax.apply_updates(point, update)
        value, gradient = optax.tree.get(state, "value"), optax.tree.get(state, "grad")  # at the new point
        derivative = largest(gradient)
        progress = (value < least_value) | (derivative < 0.9 * least_derivative)
        least_value, least_derivative = jnp.minimum(value, least_value), jnp.minimum(derivative, least_derivative)
        stale = jnp.where(progress, 0, stale + 1)
        return point, state, value, gradient, derivative, iteration + 1, least_value, least_derivative, stale

    value, gradient = evaluate(start)
    derivative = largest(gradient)
    zero = jnp.int32(0)
    carry = start, optimizer.init(start), value, gradient, derivative, zero, value, derivative, zero
    point, _, _, _, derivative, iteration, *_ = jax.lax.while_loop(going, iterate, carry)
    return point, iteration, derivative


def _mean(
    function: Callable, x_ND: jax.Array, labels_N: jax.Array, count: int, num_classes: int, *replicated: jax.Array
) -> Any:
    """The sum of `function(x_BD, labels_B, mask_B, *replicated)` over chunks of all devices' rows, divided by `count`.

    The function gets x in fp32 and gives a tree. The mask is 0 for rows that fill up, or that another chunk has.
    """
    axes = BATCH[0]

    def sum_here(x_ND: jax.Array, labels_N: jax.Array, count: jax.Array, *replicated: jax.Array) -> Any:
        here, width = x_ND.shape
        size = min(max(CHUNK // max(width, num_classes), 1), here)

        def chunk(start: jax.Array) -> Any:
            at = jnp.minimum(start, here - size)  # the last chunk is as long as the others, and overlaps
            x_BD, labels_B = (jax.lax.dynamic_slice_in_dim(rows, at, size) for rows in (x_ND, labels_N))
            place_B = at + jnp.arange(size)
            mask_B = (place_B >= start) & (jax.lax.axis_index(axes) * here + place_B < count)
            return function(x_BD.astype(jnp.float32), labels_B, mask_B.astype(jnp.float32), *replicated)

        def add(total: Any, start: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, chunk(start)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(chunk, 0))
        return jax.lax.psum(jax.lax.scan(add, zeros, jnp.arange(0, here, size))[0], axes)

    specs = (BATCH, BATCH, P(), *(P() for _ in replicated))
    total = jax.shard_map(sum_here, in_specs=specs, out_specs=P(), check_vma=False)(
        x_ND, labels_N, jnp.asarray(count), *replicated
    )
    return jax.tree.map(lambda x: x / count, total)


def _products(x_BD: jax.Array, labels_B: jax.Array, mask_B: jax.Array, mean_D: jax.Array) -> jax.Array:
    """Of centred features with one another, (D, D)."""
    centred_BD = (x_BD - mean_D) * mask_B[:, None]
    return centred_BD.T @ centred_BD


def _loss(
    x_BD: jax.Array, labels_B: jax.Array, mask_B: jax.Array, mean_D: jax.Array, kernel_DC: jax.Array, bias_C: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of the rows' cross-entropies, and its derivatives with respect to kernel and bias.

    Of a label that is almost certain, 1 - probability would be mostly rounding error. So the label is set against all
    other classes taken together.
    """
    centred_BD = x_BD - mean_D
    logits_BC = centred_BD @ kernel_DC + bias_C
    is_label_BC = labels_B[:, None] == jnp.arange(len(bias_C))
    others_BC = jnp.where(is_label_BC, -jnp.inf, logits_BC)
    label_B = jnp.sum(jnp.where(is_label_BC, logits_BC, 0), axis=1)
    lead_B = jax.nn.logsumexp(others_BC, axis=1) - label_B  # log-odds that the label is wrong
    error_BC = jnp.where(is_label_BC, -1, jax.nn.softmax(others_BC)) * (jax.nn.sigmoid(lead_B) * mask_B)[:, None]
    return jnp.sum(jax.nn.softplus(lead_B) * mask_B), centred_BD.T @ error_BC, jnp.sum(error_BC, axis=0)
