"""A frozen model as a probe sees it: what images it gets, and what it makes of them."""

import dataclasses
import functools

import jax
import numpy as np

from vit22b.config import DataConfig, Recipe
from vit22b.fingerprint import COMPUTED, digest
from vit22b.mix import normalize
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
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
