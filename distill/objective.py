"""The objective of distillation: students' losses on batches that teachers have annotated (distill/teaching.py)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from distill.config import DistillRecipe
from distill.losses import agreement, divergence, unexplained
from vit22b import init
from vit22b.flops import train_flops
from vit22b.layers import vector
from vit22b.losses import classification_loss
from vit22b.matmul import DTYPES, matmul
from vit22b.model import Output, ViT
from vit22b.model_config import ModelConfig
from vit22b.objective import Batch, on_mesh
from vit22b.optim import Independent
from vit22b.sharding import BATCH


class Adaptor(nnx.Module):
    """From a student's features to a teacher's: standardised, a dense layer, GELU, a dense layer."""

    def __init__(self, width: int, hidden: int, out: int, key: jax.Array):
        up_key, out_key = jax.random.split(key)
        spec = P("data", None)
        self.up, self.out = (
            nnx.Param(init.xavier(k, shape, spec)) for k, shape in ((up_key, (width, hidden)), (out_key, (hidden, out)))
        )
        self.up_bias, self.out_bias = vector(hidden), vector(out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, ..., D) to (B, ..., K), in x's dtype."""
        wide = x.astype(jnp.float32)
        wide = (wide - wide.mean(-1, keepdims=True)) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + 1e-6)
        x = wide.astype(x.dtype)
        for kernel, bias, last in ((self.up, self.up_bias, False), (self.out, self.out_bias, True)):
            whole = reshard(kernel[...].astype(x.dtype), P(None, None))
            letters = "btd,dk->btk" if x.ndim == 3 else "bd,dk->bk"
            x = matmul(letters, x, whole, BATCH) + bias[...].astype(x.dtype)
            x = x if last else jax.nn.gelu(x)
        return x


class Student(nnx.Module):
    """A model, and for each teacher what leads from its pooled features and its patches to the teacher's."""

    def __init__(self, config: ModelConfig, widths: tuple[int, ...], hidden: int, key: jax.Array):
        model_key, *keys = jax.random.split(key, 1 + 2 * len(widths))
        self.model = ViT(config, model_key)
        self.summary = nnx.List([Adaptor(config.width, hidden, w, k) for w, k in zip(widths, keys[::2], strict=True)])
        self.patches = nnx.List([Adaptor(config.width, hidden, w, k) for w, k in zip(widths, keys[1::2], strict=True)])


class Distillation:
    """Implements vit22b/objective.py's `Objective`. What is trained: a ViT; a `Student`, to match features; or
    `Independent` ones of either kind.
    """

    def __init__(self, recipe: DistillRecipe) -> None:
        self._recipe, self._config = recipe, recipe.distill
        self._features = recipe.distill.match == "features"

    def init(self, key: jax.Array) -> Any:
        students = self._recipe.students()
        if len(students) == 1:
            return self._init_one(self._recipe.model, key)
        keys = jax.random.split(key, len(students))
        return Independent({n: self._init_one(c, k) for (n, c), k in zip(students.items(), keys, strict=True)})

    def _init_one(self, config: ModelConfig, key: jax.Array) -> ViT | Student:
        if not self._features:
            return ViT(config, key)
        return Student(config, self._config.widths, self._config.adaptor_dim, key)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """'image' (B, S, S, 3), normalised, in the students' dtype; 'targets' (B, C) fp32, of the labels; and of each
        teacher 'logits_I' (B, C) fp32, or, in bf16 and standardised, 'summary_I' (B, K) and 'patches_I' (B, T, K).
        """
        model, count = self._recipe.model, self._recipe.batch_size
        arrays = {
            "image": on_mesh((count, model.image_size, model.image_size, 3), DTYPES[model.matmul]),
            "targets": on_mesh((count, model.num_classes), jnp.float32),
        }
        for i in range(len(self._config.teachers)):
            if self._features:
                width = self._config.widths[i]
                arrays[f"summary_{i}"] = on_mesh((count, width), jnp.bfloat16)
                arrays[f"patches_{i}"] = on_mesh((count, model.grid**2, width), jnp.bfloat16)
            else:
                arrays[f"logits_{i}"] = on_mesh((count, model.num_classes), jnp.float32)
        return arrays

    def loss(self, trained: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Batch]:
        """The sum of all students' losses. Metrics are the first student's, and the others' with their name before."""
        total, metrics = jnp.zeros(()), Batch()
        for name, student in named_students(trained).items():
            loss, found = self._loss_of_one(student, batch, key)
            total, prefix = total + loss, prefix_of(name)
            metrics |= {prefix + metric: value for metric, value in found.items()}
        return total, metrics

    def _loss_of_one(self, student: ViT | Student, batch: Batch, key: jax.Array) -> tuple[jax.Array, Batch]:
        config = self._config
        model = student.model if isinstance(student, Student) else student
        output = model(batch["image"], key=key)
        with jax.named_scope("loss"):
            labels = jnp.mean(classification_loss(self._logits(model, output), batch["targets"], self._recipe.loss))
            weights = config.weights or (1.0,) * len(config.teachers)
            teachers, metrics = jnp.zeros(()), {"label_loss": labels}
            for i, weight in enumerate(weights):
                if isinstance(student, Student):
                    lost, found = self._features_lost(student, output, batch, i)
                else:
                    lost = divergence(output.logits, batch[f"logits_{i}"], config.temperature)
                    found = {"agreement": agreement(output.logits, batch[f"logits_{i}"])}
                teachers += weight * lost
                metrics |= {f"{name}_{i}" if len(weights) > 1 else name: value for name, value in found.items()}
            metrics["teacher_loss"] = teachers
            if self._features and not config.label_weight:
                return teachers + labels, metrics
            return (1 - config.label_weight) * teachers + config.label_weight * labels, metrics

    def _logits(self, model: ViT, output: Output) -> jax.Array:
        """Where labels teach the student nothing, its classifier learns from them all the same, to be evaluated."""
        if self._config.label_weight or not self._features:
            return output.logits
        kernel_DC = reshard(model.head_kernel[...], P(None, None))
        pooled_BD = jax.lax.stop_gradient(output.pooled)
        return matmul("bd,dc->bc", pooled_BD, kernel_DC, BATCH) + model.head_bias[...]

    def _features_lost(self, student: Student, output: Output, batch: Batch, i: int) -> tuple[jax.Array, Batch]:
        config, grid = student.model.config, self._recipe.model.grid
        patches = reshard(output.tokens, BATCH)[:, config.num_tokens - grid**2 :]
        lost = {
            "summary": unexplained(student.summary[i](output.pooled.astype(patches.dtype)), batch[f"summary_{i}"]),
            "patches": unexplained(student.patches[i](patches), batch[f"patches_{i}"]),
        }
        total = self._config.summary_weight * lost["summary"] + self._config.patch_weight * lost["patches"]
        return total, lost

    def models(self, trained: Any) -> dict[str, ViT]:
        return {
            prefix_of(name): student.model if isinstance(student, Student) else student
            for name, student in named_students(trained).items()
        }

    def flops(self) -> int:
        return sum(train_flops(config) for config in self._recipe.students().values())


def named_students(trained: Any) -> dict[str, ViT | Student]:
    return trained.models if isinstance(trained, Independent) else {"student": trained}


def prefix_of(name: str) -> str:
    """Of the names of a student's metrics."""
    return "" if name == "student" else f"{name}/"
