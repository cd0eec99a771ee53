"""What is measured on a validation set: sums that add up over batches to exact values for the whole set."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from vit22b.config import LossConfig
from vit22b.losses import classification_loss

NUM_BINS = 15  # of confidence, as in [Guo 2017]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "loss", "top1", "top5", "bin_count", "bin_confidence", "bin_correct"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ClassificationSums:
    """Sums over examples, scalars; `bin_*` per confidence bin, (15,). fp32 for a batch, fp64 on the host for a set."""

    count: jax.Array
    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    bin_count: jax.Array
    bin_confidence: jax.Array
    bin_correct: jax.Array

    def __add__(self, other: "ClassificationSums") -> "ClassificationSums":
        return jax.tree.map(operator.add, self, other)

    def on_host(self) -> "ClassificationSums":
        """The same in fp64; waits for the device."""
        return jax.tree.map(lambda x: np.asarray(x, np.float64), self)

    def result(self) -> dict[str, float]:
        """Loss, top-1, top-5 and expected calibration error, over all examples added up."""
        sums = self.on_host()
        gaps = np.abs(sums.bin_confidence - sums.bin_correct)
        return {
            "loss": float(sums.loss / sums.count),
            "top1": float(sums.top1 / sums.count),
            "top5": float(sums.top5 / sums.count),
            "ece": float(gaps.sum() / sums.count),
            "examples": int(sums.count),
        }


def classification_sums(
    logits_BC: jax.Array, labels_B: jax.Array, mask_B: jax.Array, config: LossConfig
) -> ClassificationSums:
    """Sums over the examples of a batch whose mask is 1.

    Top-k counts a label with fewer than k classes ahead; of equal logits the lower index is ahead. Confidence is
    the winner's probability: softmax, or with the sigmoid loss its own sigmoid.
    Calibration error: 15 bins of equal width [Guo 2017, section 3].
    """
    targets_BC = jax.nn.one_hot(labels_B, logits_BC.shape[1])
    label_logit_B = jnp.sum(logits_BC * targets_BC, axis=-1)
    ties_lost_BC = (logits_BC == label_logit_B[:, None]) & (jnp.arange(logits_BC.shape[1]) >= labels_B[:, None])
    ahead_BC = ~(logits_BC < label_logit_B[:, None]) & ~ties_lost_BC  # NaN counts as ahead
    rank_B = jnp.sum(ahead_BC.astype(jnp.int32), axis=-1)
    probabilities = jax.nn.sigmoid if config.kind == "sigmoid" else functools.partial(jax.nn.softmax, axis=-1)
    confidence_B = jnp.max(probabilities(logits_BC), axis=-1)
    bins_B = jnp.clip((confidence_B * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    member_BK = jax.nn.one_hot(bins_B, NUM_BINS) * mask_B[:, None]
    top1_B = (rank_B == 0).astype(jnp.float32)
    plain = dataclasses.replace(config, label_smoothing=0.0, z_loss=0.0)  # the loss without its regularisers
    return ClassificationSums(
        count=jnp.sum(mask_B),
        loss=jnp.sum(classification_loss(logits_BC, targets_BC, plain) * mask_B),
        top1=jnp.sum(top1_B * mask_B),
        top5=jnp.sum((rank_B < 5).astype(jnp.float32) * mask_B),
        bin_count=jnp.sum(member_BK, axis=0),
        bin_confidence=jnp.sum(member_BK * confidence_B[:, None], axis=0),
        bin_correct=jnp.sum(member_BK * top1_B[:, None], axis=0),
    )
