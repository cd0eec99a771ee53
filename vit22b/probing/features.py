"""Features of images, by name: what of an encoder's activations a probe gets.

A feature is terms joined by '+', whose vectors are put one behind the other. A term is a pooling, of 'cls' and 'mean'
optionally of which blocks:

    pixels        the normalised image itself, which any encoder should be better than
    pooled        the input of the encoder's own classifier: of attention pooling, or whatever the encoder has
    cls           the class token
    mean          the mean of the patches
    cls@9         after block 9 of 1 .. depth instead of the last
    mean@last4    after each of the last 4 blocks, one behind the other

Activations get the encoder's final norm, of inner blocks too, as DINOv2 does for its probes; where the encoder norms
what is pooled instead, these get that.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from vit22b.errors import RecipeError, check
from vit22b.model import Output, ViT
from vit22b.model_config import ModelConfig
from vit22b.sharding import BATCH

PIXELS, POOLED = "pixels", "pooled"


@dataclasses.dataclass(frozen=True)
class Term:
    pool: str  # 'pixels', 'pooled', 'cls', 'mean'
    blocks: tuple[int, ...] = ()  # from 0; of the first two none


def parse_feature(name: str, config: ModelConfig) -> tuple[Term, ...]:
    """The terms of a feature of this encoder; raises `RecipeError`."""
    return tuple(_parse_term(text.strip(), name, config) for text in name.split("+"))


def _parse_term(text: str, name: str, config: ModelConfig) -> Term:
    match = re.fullmatch(r"(pixels|pooled|cls|mean)(?:@(last)?(\d+))?", text)
    if match is None or (match[1] in (PIXELS, POOLED) and match[3]):
        raise RecipeError(
            f"--features={name}: {text!r} is none; give pooled, cls, mean, cls@9, mean@last4, 'cls+mean', or pixels"
        )
    if match[1] in (PIXELS, POOLED):
        return Term(match[1])
    check(
        match[1] != "cls" or config.class_token, "--features", name, "the encoder has no class token; use pooled, mean"
    )
    depth = config.depth
    number = int(match[3] or depth)
    check(1 <= number <= depth, "--features", name, f"the encoder has blocks 1 to {depth}")
    return Term(match[1], tuple(range(depth - number, depth)) if match[2] else (number - 1,))


def width(terms: tuple[Term, ...], config: ModelConfig, image_size: int) -> int:
    """Numbers in a feature of images of that size."""
    whole = {PIXELS: 3 * image_size**2, POOLED: config.pooled_width}
    return sum(whole.get(term.pool, config.width * len(term.blocks)) for term in terms)


def see(model: ViT, images: jax.Array, features: dict[str, tuple[Term, ...]]) -> dict[str, jax.Array]:
    """Each feature of normalised images (B, S, S, 3), by name: (B, D), fp32."""
    terms = {term for of_feature in features.values() for term in of_feature}
    layers = tuple(sorted({block for term in terms for block in term.blocks}))
    output = model(images, layers=layers)
    vectors = {term: _vector(model, images, output, term, layers) for term in terms}
    return {name: jnp.concatenate([vectors[term] for term in of], axis=1) for name, of in features.items()}


def _vector(model: ViT, images: jax.Array, output: Output, term: Term, layers: tuple[int, ...]) -> jax.Array:
    if term.pool == PIXELS:
        return jax.lax.reshape(images, (len(images), math.prod(images.shape[1:])), out_sharding=BATCH)
    if term.pool == POOLED:
        return output.pooled
    assert output.layers is not None
    pooled = [_pool(model, output.layers[layers.index(block)], term.pool) for block in term.blocks]
    return jnp.concatenate(pooled, axis=1)


def _pool(model: ViT, x_BTD: jax.Array, pool: str) -> jax.Array:
    """(B, D) of the residual stream after a block."""
    config, normed = model.config, model.norm if model.norm is not None else lambda x: x
    num_prefix = config.class_token + config.num_registers
    x_BTD = x_BTD[:, :1] if pool == "cls" else x_BTD[:, num_prefix:]
    if config.final_norm != "pooled":
        x_BTD = normed(x_BTD)
    pooled_BD = reshard(jnp.mean(x_BTD.astype(jnp.float32), axis=1), BATCH)
    return normed(pooled_BD) if config.final_norm == "pooled" else pooled_BD
