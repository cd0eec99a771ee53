"""What a student's outputs lack of a teacher's: means over a batch, fp32."""

import jax
import jax.numpy as jnp


def divergence(student_BC: jax.Array, teacher_BC: jax.Array, temperature: float) -> jax.Array:
    """temperature^2 x KL(teacher || student) of the softmax of logits / temperature [Hinton 2015, section 2]."""
    theirs = jax.nn.log_softmax(teacher_BC / temperature)
    own = jax.nn.log_softmax(student_BC / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1))


def agreement(student_BC: jax.Array, teacher_BC: jax.Array) -> jax.Array:
    """The share of examples for which both rank the same class first."""
    return jnp.mean((jnp.argmax(student_BC, -1) == jnp.argmax(teacher_BC, -1)).astype(jnp.float32))


def unexplained(found: jax.Array, standardised: jax.Array) -> jax.Array:
    """The part of the variance of standardised features that is not predicted: their mean alone would give 1."""
    return jnp.mean(jnp.square(found.astype(jnp.float32) - standardised.astype(jnp.float32)))
