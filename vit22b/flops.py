"""Matmul FLOPs: those of a model, for MFU, and those that a traced function executes.

A multiply-add counts as two. Norms, softmax and other elementwise work are not counted; for MFU, neither is whatever
rematerialisation computes again: it is useful work over peak [Chowdhery 2022, appendix B].
"""

import math
from typing import TYPE_CHECKING, Any

from vit22b.model_config import ModelConfig

if TYPE_CHECKING:  # a model's own FLOPs also serve programs without JAX
    from jax.extend import core


def forward_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image's forward pass at the recipe's resolution."""
    d, f, t = config.width, config.mlp_dim, config.num_tokens
    mlp = (3 if config.mlp == "swiglu" else 2) * d * f
    block = 2 * t * (4 * d * d + mlp) + 4 * t * t * d
    embed = 2 * config.grid**2 * 3 * config.patch_size**2 * d
    # Attention pooling: keys and values of all tokens; query, output and MLP of one.
    pool = 2 * t * 2 * d * d + 2 * (2 * d * d + mlp) + 4 * t * d if config.pool == "map" else 0
    return embed + config.depth * block + pool + 2 * config.pooled_width * config.num_classes


def train_flops(config: ModelConfig) -> int:
    """Matmul FLOPs of one image's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops(config)


def executed_flops(jaxpr: "core.Jaxpr") -> int:
    """Matmul FLOPs of a traced function on all devices together, with what it computes twice.

    Loops count as often as they run, shards as often as there are devices. Of a `cond` the largest branch counts; a
    `while` of unknown length, of which the step has none with matmuls, counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[i] for i in contracted) * math.prod(result.shape)
            continue
        inner = [executed_flops(sub) for sub in subjaxprs(equation)]
        times = 1
        if equation.primitive.name == "scan":
            times = equation.params["length"]
        elif equation.primitive.name == "shard_map":
            times = math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
        total += times * (max(inner, default=0) if equation.primitive.name == "cond" else sum(inner))
    return total


def subjaxprs(equation: "core.JaxprEqn") -> "list[core.Jaxpr]":
    """The functions that an equation calls when it is executed; rules for derivatives are not."""
    from jax.extend import core

    found = []
    for name, value in equation.params.items():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr) and not name.startswith(("fwd", "bwd", "jvp")):
                found.append(item.jaxpr if isinstance(item, core.ClosedJaxpr) else item)
    return found
