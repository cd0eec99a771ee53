"""A teacher's distribution over classes in a few numbers: the most probable ones, and what all others have together."""

import jax
import jax.numpy as jnp


def most_probable(logits_BC: jax.Array, k: int, temperature: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the softmax of logits / temperature: k classes (B, K), int32, the logarithms of their probabilities (B, K), in
    falling order, and `others` (B,); fp32.
    """
    log_probs_BC = jax.nn.log_softmax(logits_BC / temperature)
    log_probs_BK, classes_BK = jax.lax.top_k(log_probs_BC, k)
    return classes_BK, log_probs_BK, others(log_probs_BC, classes_BK)


def others(log_probs_BC: jax.Array, classes_BK: jax.Array) -> jax.Array:
    """The logarithm of what all other classes have together (B,); -inf where there are no others.

    It is added up over them: 1 minus the sum of the given ones would be little but their rounding.
    """
    return jax.nn.logsumexp(log_probs_BC.at[rows(classes_BK), classes_BK].set(-jnp.inf), axis=1)


def all_log_probs(classes_BK: jax.Array, log_probs_BK: jax.Array, others_B: jax.Array, num_classes: int) -> jax.Array:
    """Log-probabilities of all classes (B, C), fp32: the others share alike."""
    count, k = classes_BK.shape
    each_B1 = others_B[:, None] - jnp.log(max(num_classes - k, 1))
    classes_BK = classes_BK.astype(jnp.int32)
    full_BC = jnp.broadcast_to(each_B1, (count, num_classes))
    return full_BC.at[rows(classes_BK), classes_BK].set(log_probs_BK.astype(jnp.float32))


def variation(
    logits_BC: jax.Array, classes_BK: jax.Array, log_probs_BK: jax.Array, others_B: jax.Array, temperature: float
) -> jax.Array:
    """How far the softmax of logits / temperature is from a stored distribution (B,): their total variation, 0 to 1.

    It is the largest difference in the probability of any set of the stored classes, all others counting as one more.
    """
    classes_BK = classes_BK.astype(jnp.int32)
    live_BC = jax.nn.log_softmax(logits_BC / temperature)
    live_BK = jnp.take_along_axis(live_BC, classes_BK, axis=1)
    known_B = jnp.sum(jnp.abs(jnp.exp(live_BK) - jnp.exp(log_probs_BK.astype(jnp.float32))), axis=1)
    return 0.5 * (known_B + jnp.abs(jnp.exp(others(live_BC, classes_BK)) - jnp.exp(others_B)))


def rows(classes_BK: jax.Array) -> jax.Array:
    """(B, 1): the place of each row, to index with the classes in it."""
    return jnp.arange(classes_BK.shape[0])[:, None]
