"""What the device does to a batch before the model sees it: normalization, mixup, cutmix.

Images are mixed in neighbouring pairs (0 with 1, 2 with 3, ...), each pair with its own ratio. Examples
come shuffled, so the pairs are random; and since a pair lies on one device, mixing needs no communication
and gives the same batch on every mesh.
"""

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from vit22b.config import DataConfig
from vit22b.sharding import BATCH


def normalize(images: jax.Array, config: DataConfig) -> jax.Array:
    """uint8 (B, S, S, 3) to fp32 with `config.mean` and `config.std`, which are for values in [0, 1]."""
    mean, std = (jnp.array(values, jnp.float32) for values in (config.mean, config.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def mix(images: jax.Array, targets_BC: jax.Array, key: jax.Array, config: DataConfig) -> tuple[jax.Array, jax.Array]:
    """Mixup [Zhang 2018] or cutmix [Yun 2019] of images (B, S, S, 3) and their targets.

    With both on, each batch draws one of the two with equal chance.
    """
    if not config.mixup and not config.cutmix:
        return images, targets_BC
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    pairs, size = images.shape[0] // 2, images.shape[1]
    # The part of its own image that an example keeps, per pixel (P, S, S) and in all (P,).
    if config.mixup:
        ratio_P = jax.random.beta(mixup_key, config.mixup, config.mixup, (pairs,))
        share_P = jnp.maximum(ratio_P, 1 - ratio_P)  # the larger part stays its own
        weight_PSS = jnp.broadcast_to(share_P[:, None, None], (pairs, size, size))
    if config.cutmix:
        box_PSS = outside_box(cutmix_key, config.cutmix, pairs, size).astype(jnp.float32)
        use_box = jax.random.bernoulli(choice_key, 0.5) if config.mixup else True
        share_P = jnp.where(use_box, box_PSS.mean(axis=(1, 2)), share_P if config.mixup else 0)
        weight_PSS = jnp.where(use_box, box_PSS, weight_PSS if config.mixup else 0)
    share_P, weight_PSS = reshard(share_P, BATCH), reshard(weight_PSS, BATCH)
    return blend(images, weight_PSS[..., None]), blend(targets_BC, share_P[:, None])


def blend(x: jax.Array, weight: jax.Array) -> jax.Array:
    """weight x own + (1 - weight) x partner's, for (B, ...) in neighbouring pairs and one weight per pair."""
    pairs = jax.lax.reshape(x, (x.shape[0] // 2, 2, *x.shape[1:]), out_sharding=BATCH)
    weight = weight[:, None]
    return jax.lax.reshape(weight * pairs + (1 - weight) * pairs[:, ::-1], x.shape, out_sharding=BATCH)


def outside_box(key: jax.Array, alpha: float, count: int, size: int) -> jax.Array:
    """Cutmix masks (count, size, size): True outside a box of Beta(a, a) times the area, cut at the border."""
    share_key, centre_key = jax.random.split(key)
    side = size * jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, (count,)))
    centres = jax.random.uniform(centre_key, (2, count), maxval=size)
    pixel = jnp.arange(size) + 0.5
    rows, columns = (jnp.abs(pixel - c[:, None]) < side[:, None] / 2 for c in centres)
    return ~(rows[:, :, None] & columns[:, None, :])
