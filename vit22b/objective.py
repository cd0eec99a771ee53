"""What a run trains and on which loss: the part of a train step that differs between supervision and distillation."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, get_abstract_mesh, get_mesh

from vit22b.config import Recipe
from vit22b.flops import train_flops
from vit22b.losses import classification_loss
from vit22b.mix import mix, normalize
from vit22b.model import ViT
from vit22b.sharding import BATCH

Batch = dict[str, jax.Array]


class Objective(Protocol):
    """Pure functions, of which the train step is made. The trained pytree is a model, or has several models in it."""

    def init(self, key: jax.Array) -> Any:
        """What is trained, fresh; traced on the mesh in force, on which it is created sharded."""

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the train step gets, on the mesh in force."""

    def loss(self, trained: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss of a (micro)batch, and more means to log, by name; fp32 scalars."""

    def models(self, trained: Any) -> dict[str, ViT]:
        """The models that are evaluated, each with the prefix of its metrics' names."""

    def flops(self) -> int:
        """Matmul FLOPs of one image's training step that count for MFU."""


class Supervised:
    """Images and labels."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def init(self, key: jax.Array) -> ViT:
        return ViT(self._recipe.model, key)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """'image' uint8 (B, S, S, 3), 'label' int32 (B,)."""
        count, size = self._recipe.batch_size, self._recipe.model.image_size
        return {"image": on_mesh((count, size, size, 3), jnp.uint8), "label": on_mesh((count,), jnp.int32)}

    def loss(self, trained: ViT, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The recipe's loss of images that are normalised and mixed here, on the device."""
        recipe = self._recipe
        mix_key, model_key = jax.random.split(key)
        targets_BC = jax.nn.one_hot(batch["label"], recipe.model.num_classes)
        with jax.named_scope("input"):
            images, targets_BC = mix(normalize(batch["image"], recipe.data), targets_BC, mix_key, recipe.data)
        logits_BC = trained(images, key=model_key).logits
        with jax.named_scope("loss"):
            return jnp.mean(classification_loss(logits_BC, targets_BC, recipe.loss)), {}

    def models(self, trained: ViT) -> dict[str, ViT]:
        return {"": trained}

    def flops(self) -> int:
        return train_flops(self._recipe.model)


def on_mesh(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An abstract array, split over the batch, on the mesh in force, real or abstract."""
    mesh = get_mesh() if get_abstract_mesh().empty else get_abstract_mesh()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))
