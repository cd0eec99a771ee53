"""The activations of MLPs, as XLA computes them; those of vit22b/kernels have the same names."""

import functools
from collections.abc import Callable

import jax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "swiglu": jax.nn.silu,
}
# Largest magnitude of the slope, rounded up, of those that are no larger than their input: |f(x)| <= |x|.
STEEPEST = {"gelu": 1.13, "gelu_tanh": 1.13}
