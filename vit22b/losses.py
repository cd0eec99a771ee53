"""Classification losses, fp32, per example.

Logits (B, C); targets (B, C), rows summing to 1 (softmax) or any values in [0, 1] (sigmoid).
"""

import jax
import jax.numpy as jnp
import optax

from vit22b.config import LossConfig


def classification_loss(logits_BC: jax.Array, targets_BC: jax.Array, config: LossConfig) -> jax.Array:
    """The recipe's loss for each example, (B,)."""
    if config.label_smoothing:
        targets_BC = optax.smooth_labels(targets_BC, config.label_smoothing)
    if config.kind == "sigmoid":  # summed over classes [Beyer 2020, section 5]; ViT-22B's pre-training loss
        return optax.sigmoid_binary_cross_entropy(logits_BC, targets_BC).sum(axis=-1)
    loss_B = optax.softmax_cross_entropy(logits_BC, targets_BC)
    if config.z_loss:  # keeps log Z near 0 [Chowdhery 2022, section 5]
        loss_B = loss_B + config.z_loss * jnp.square(jax.nn.logsumexp(logits_BC, axis=-1))
    return loss_B
