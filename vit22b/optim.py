"""Schedules, weight-decay groups and optimizers.

For all: clip by global norm, then one chain that preconditions, adds weight decay, scales by the schedule. Parameters
are told apart by their path in the model, since stacked blocks make a norm's scale two-dimensional.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit22b.config import OptimConfig
from vit22b.names import path_name

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
# The body's matrices; everything else there is a bias, a scale, a token or a position.
MATRICES = ("query", "key", "value", "out", "gate", "up", "patch_kernel")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["models"], meta_fields=[])
@dataclasses.dataclass
class Independent:
    """Models, by name, that are trained side by side and have nothing but the batches in common."""

    models: dict[str, Any]


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of a step (0-based), as a function that jit can trace.

    Warm-up: peak x (step + 1) / warmup_steps, so that the first step moves. Then, with s steps since warm-up:
    'rsqrt': peak / sqrt(1 + s / timescale) [Zhai 2022, section 3.5]; 'wsd', 'constant': peak;
    'cosine': half a cosine to final_fraction x peak. 'rsqrt' and 'wsd' are multiplied by a line from 1 to
    final_fraction over the last `cooldown_steps`. Both ends are reached at `total_steps`, one after the last step.
    """
    warmup, cooldown, final = config.warmup_steps, config.cooldown_steps, config.final_fraction

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        since = jnp.maximum(step - warmup, 0.0)
        rate = jnp.float32(config.learning_rate)
        if config.schedule == "rsqrt":
            rate = rate * jax.lax.rsqrt(1 + since / config.timescale_steps)
        if config.schedule == "cosine":
            progress = jnp.minimum(since / max(total_steps - warmup, 1), 1.0)
            rate = rate * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        if cooldown:
            left = jnp.clip((total_steps - step) / cooldown, 0.0, 1.0)
            rate = rate * (final + (1 - final) * left)
        if warmup:
            rate = rate * jnp.minimum((step + 1) / warmup, 1.0)
        return rate

    return learning_rate


def label(model, name_to_label: Callable[[str], object]):
    """A tree like `model` with `name_to_label(name)` for each parameter, by the last part of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: name_to_label(path_name(path).split("/")[-1]), model)


def decay_rates(model, config: OptimConfig):
    """Weight decay per parameter: the head's matrix, the body's matrices, and 0 for all else."""
    rates = dict.fromkeys(MATRICES, config.weight_decay) | {"head_kernel": config.head_weight_decay}
    return label(model, lambda name: rates.get(name, 0.0))


def add_weight_decay(config: OptimConfig) -> optax.GradientTransformation:
    """Adds decay x parameter to each update [Loshchilov & Hutter 2019], by group."""

    def update(updates, state, params):
        rates = decay_rates(params, config)
        return jax.tree.map(lambda u, p, rate: u + rate * p if rate else u, updates, params, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Adafactor as Google's large ViTs use it [Zhai 2022, section 3.4]: no update clipping, no parameter scaling.

    The second moment is factored for matrices with both dims >= 32 and decays by min(beta2, 1 - t^-0.8); a
    momentum of the scaled update follows. Vectors keep a full second moment, also where stacking makes them
    two-dimensional.
    """

    def factored(enabled: bool):
        return optax.scale_by_factored_rms(
            factored=enabled,
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=lambda step, exponent: jnp.minimum(config.beta2, 1 - (step + 1.0) ** -exponent),
        )

    def groups(model):
        return label(model, lambda name: "matrix" if name in (*MATRICES, "head_kernel") else "vector")

    second_moment = optax.partition({"matrix": factored(True), "vector": factored(False)}, groups)
    momentum = optax.ema(config.beta1, debias=False, accumulator_dtype=DTYPES[config.momentum_dtype])
    return optax.chain(second_moment, momentum)


def scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    """Adam's direction with bias correction; the first moment may be bf16."""
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=DTYPES[config.momentum_dtype])


def scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon [Jordan 2024] for the matrices inside blocks and pooling, AdamW's rule for everything else.

    Updates have the RMS of AdamW's (0.2 x sqrt(max dim) after orthogonalisation, [Liu 2025, section 2.2]), so
    learning rates and decays carry over.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)  # each layer on its own
    orthogonal = optax.contrib.scale_by_muon(
        beta=config.beta1,
        mu_dtype=DTYPES[config.momentum_dtype],
        weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: matrix, updates),
    )
    rms = optax.stateless_with_tree_map(lambda u, _: 0.2 * max(u.shape[-2:]) ** 0.5 * u)

    def groups(model):
        return label(model, lambda name: "matrix" if name in MATRICES and name != "patch_kernel" else "other")

    # Not optax.contrib.muon, which gives the others Nesterov's form of Adam.
    muon = optax.partition({"matrix": optax.chain(orthogonal, rms), "other": scale_by_adam(config)}, groups)

    def update(updates, state, params):
        # The products of sharded matrices need no layout of ours: inside, the compiler chooses it.
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(muon.update, out_sharding=specs)(updates, state, params)

    return optax.GradientTransformation(muon.init, update)


def global_norm(gradients, unrolled: bool) -> jax.Array:
    """The Euclidean norm of all gradients together, fp32 scalar.

    `unrolled`: layers do not run in a loop, so that a stack of their gradients exists as its parts alone; each is then
    added up where it lies. XLA would find the place of every element among all parts: for 2.7 G parameters that took
    13 ms on an H200, where this takes 2 on an H100.
    """

    def squares(path: tuple, gradient: jax.Array) -> jax.Array:
        if unrolled and "blocks" in path_name(path).split("/"):
            return functools.reduce(jnp.add, [jnp.sum(jnp.square(layer)) for layer in gradient])
        return jnp.sum(jnp.square(gradient))

    found = jax.tree.leaves(jax.tree_util.tree_map_with_path(squares, gradients))
    return jnp.sqrt(functools.reduce(jnp.add, found))


def clip(gradients, limit: float, unrolled: bool) -> tuple:
    """The gradients, scaled down so that their norm is `limit` at most (0: as they are), and the norm they had.

    Of several models each is clipped by its own norm; the norm given is that of all. `unrolled` as in `global_norm`.
    """
    if isinstance(gradients, Independent):
        clipped = {name: clip(part, limit, unrolled) for name, part in gradients.models.items()}
        norms = jnp.stack([norm for _, norm in clipped.values()])
        return Independent({name: part for name, (part, _) in clipped.items()}), jnp.sqrt(jnp.sum(norms**2))
    norm = global_norm(gradients, unrolled)
    if not limit:
        return gradients, norm
    factor = jnp.minimum(1.0, limit / norm)
    return jax.tree.map(lambda gradient: gradient * factor, gradients), norm


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a recipe, from clipped gradients to what is added to the parameters."""
    scale = {"adamw": scale_by_adam, "adafactor": scale_by_adafactor, "muon": scale_by_muon}[config.name](config)
    return optax.chain(
        optax.identity(),  # clipping, before it was `clip`: checkpoints number the parts of this chain
        scale,
        add_weight_decay(config),
        optax.scale_by_learning_rate(schedule(config, total_steps)),
    )
