"""A frozen model as a probe sees it: what images it gets, and what it makes of them."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from vit22b.config import DataConfig, Recipe
from vit22b.mix import normalize
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.probing.config import ProbeConfig
from vit22b.probing.features import Term, parse_feature, see, width
from vit22b.probing.store import BF16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    model: ViT
    recipe: Recipe  # of which the input pipeline reads how images are made, and how many at a time
    terms: dict[str, tuple[Term, ...]]  # of each feature
    dtype: np.dtype  # of stored features

    @property
    def config(self) -> ModelConfig:
        """As the model computes here; the image size is that of its positions."""
        return self.model.config

    @property
    def widths(self) -> dict[str, int]:
        return {name: width(terms, self.config, self.recipe.model.image_size) for name, terms in self.terms.items()}

    @functools.cached_property
    def see(self):
        """Features by name, (B, D), of images uint8 (B, S, S, 3) on the mesh in force."""
        data, terms, dtype = self.recipe.data, self.terms, self.dtype

        @jax.jit
        def compute(model: ViT, images: jax.Array) -> dict[str, jax.Array]:
            found = see(model, normalize(images, data), terms)
            return {name: x.astype(dtype) for name, x in found.items()}

        return functools.partial(compute, self.model)

    @functools.cached_property
    def identity(self) -> dict[str, object]:
        """What its features depend on, beside the images; found once, as it takes a look at every parameter."""
        data = self.recipe.data
        return {
            "model": digest(self.model),
            "architecture": {k: v for k, v in dataclasses.asdict(self.config).items() if k not in COMPUTED},
            "features": list(self.terms),
            "dtype": self.dtype.name,
            "image_size": self.recipe.model.image_size,
            "eval_crop_fraction": data.eval_crop_fraction,
            "eval_resize": data.eval_resize,
            "mean": list(data.mean),
            "std": list(data.std),
        }


# Fields of `ModelConfig` that change speed and rounding at most.
COMPUTED = ("attention", "kernels", "remat", "overlap", "scan_unroll", "stochastic_depth", "init", "head_bias")


def encoder_of(model: ViT, data: DataConfig, config: ProbeConfig) -> Encoder:
    """An encoder with the features, image size and batch size that `config` asks for; raises `RecipeError`."""
    terms = {feature: parse_feature(feature, model.config) for feature in config.features}
    size = config.image_size or model.config.image_size
    data = dataclasses.replace(
        data,
        train=config.train,
        validation=config.val,
        train_images=0,
        crop="inception",
        flip=True,
        min_area=config.min_area,
        augment="none",
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        workers=config.workers,
        threads=config.threads,
    )
    recipe = Recipe(
        name="probe",
        total_steps=1,
        batch_size=config.extract_batch_size,
        seed=config.seed,
        model=dataclasses.replace(model.config, image_size=size),
        data=data,
    )
    recipe.validate()
    dtype = BF16 if config.dtype == "bf16" else np.dtype(np.float32)
    return Encoder(model=model, recipe=recipe, terms=terms, dtype=dtype)


def digest(model: ViT) -> str:
    """A hash of all parameters as they are on the devices, however they are sharded."""
    found = [(name, leaf.shape, leaf.dtype.name) for name, leaf in named_leaves(model).items()]
    values = [int(x) for x in jax.tree.leaves(_checksums(model))]
    return hashlib.sha256(repr((found, values)).encode()).hexdigest()[:16]


@jax.jit
def _checksums(model: ViT) -> ViT:
    return jax.tree.map(_checksum, model)


def _checksum(x: jax.Array) -> jax.Array:
    """The sum of all elements' bits, each times an odd number of its place, modulo 2^32: no order changes it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for dim in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim, out_sharding=jax.typeof(bits).sharding)
        place = (place ^ index) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((bits ^ (bits >> 13)) * (2 * place + 1), dtype=jnp.uint32)
