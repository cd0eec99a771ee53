"""One step of training or evaluation: pure functions of state and batch, and the state itself.

Randomness of a step comes from (seed, step) alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, get_abstract_mesh, get_mesh

from vit22b.config import Recipe
from vit22b.losses import classification_loss
from vit22b.metrics import ClassificationSums, classification_sums
from vit22b.mix import mix, normalize
from vit22b.model import ViT
from vit22b.optim import clip, global_norm, make_optimizer, schedule
from vit22b.sharding import BATCH


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "model", "opt_state", "ema"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """Everything a step changes. `step` counts finished steps, int32; `ema` is None where it is off."""

    step: jax.Array
    model: ViT
    opt_state: optax.OptState
    ema: ViT | None

    @property
    def eval_model(self) -> ViT:
        return self.model if self.ema is None else self.ema


def init_state(recipe: Recipe) -> TrainState:
    """A fresh state. To be called under `jax.jit` or `jax.eval_shape` with the mesh set: it is created sharded."""
    model = ViT(recipe.model, jax.random.fold_in(jax.random.key(recipe.seed), 0))
    opt_state = make_optimizer(recipe.optim, recipe.total_steps).init(model)
    ema = jax.tree.map(jnp.copy, model) if recipe.optim.ema_decay else None
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=opt_state, ema=ema)


def abstract_state(recipe: Recipe) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh in force, real or abstract; allocates nothing."""
    return jax.eval_shape(functools.partial(init_state, recipe))


def abstract_batch(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch: 'image' uint8 (B, S, S, 3), 'label' int32 (B,)."""
    mesh, size = get_mesh() if get_abstract_mesh().empty else get_abstract_mesh(), recipe.model.image_size
    placed = NamedSharding(mesh, BATCH)
    return {
        "image": jax.ShapeDtypeStruct((recipe.batch_size, size, size, 3), jnp.uint8, sharding=placed),
        "label": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32, sharding=placed),
    }


def supervised_loss(recipe: Recipe, model: ViT, batch: dict, key: jax.Array) -> jax.Array:
    """Mean loss of a (micro)batch of uint8 images and integer labels, augmented on the device."""
    mix_key, model_key = jax.random.split(key)
    targets_BC = jax.nn.one_hot(batch["label"], recipe.model.num_classes)
    with jax.named_scope("input"):
        images, targets_BC = mix(normalize(batch["image"], recipe.data), targets_BC, mix_key, recipe.data)
    logits_BC = model(images, key=model_key).logits
    with jax.named_scope("loss"):
        return jnp.mean(classification_loss(logits_BC, targets_BC, recipe.loss))


def loss_and_gradients(recipe: Recipe, model: ViT, batch: dict, key: jax.Array) -> tuple[jax.Array, ViT]:
    """Mean loss and gradient of a batch, over `accumulate_steps` microbatches in turn."""
    value_and_grad = jax.value_and_grad(functools.partial(supervised_loss, recipe))
    count = recipe.optim.accumulate_steps
    if count == 1:
        return value_and_grad(model, batch, key)

    def split(x):  # every count-th example, which each device has: no example moves
        x = jax.lax.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=BATCH)
        return jnp.moveaxis(x, 1, 0)

    def add(total, inputs):
        microbatch, microbatch_key = inputs
        return jax.tree.map(jnp.add, total, value_and_grad(model, microbatch, microbatch_key)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, model))
    total, _ = jax.lax.scan(add, zero, (jax.tree.map(split, batch), jax.random.split(key, count)))
    return jax.tree.map(lambda x: x / count, total)


def train_step(recipe: Recipe, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Metrics are fp32 scalars: 'loss', 'gradient_norm', 'learning_rate'.

    Where loss or gradient is not finite the state keeps its values, apart from the step.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), 1), state.step)
    loss, gradients = loss_and_gradients(recipe, state.model, batch, key)
    with jax.named_scope("optimizer"):
        norm = global_norm(gradients, recipe.model.unrolled)
        gradients = clip(gradients, norm, recipe.optim.clip_norm)
        optimizer = make_optimizer(recipe.optim, recipe.total_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
        model, ema = optax.apply_updates(state.model, updates), state.ema
        if ema is not None:
            ema = optax.incremental_update(model, ema, 1 - recipe.optim.ema_decay)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        state = TrainState(
            step=state.step + 1,
            model=keep(model, state.model),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
        )
    learning_rate = schedule(recipe.optim, recipe.total_steps)(state.step - 1)
    return state, {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate}


def trace_train_step(recipe: Recipe, state: TrainState) -> jax.stages.Traced:
    """The train step for an abstract state on the mesh in force; the state given to it is donated."""
    return jax.jit(functools.partial(train_step, recipe), donate_argnums=0).trace(state, abstract_batch(recipe))


def compiler_options(recipe: Recipe) -> dict[str, bool | int | str]:
    """XLA's options for the train step on the devices in use, beside those in XLA_FLAGS."""
    if jax.default_backend() != "gpu" or recipe.model.matmul != "fp8":
        return {}
    return {
        # XLA tries its Triton matmuls for each fp8 one: minutes of compilation, and cuBLASLt's were faster on an H200.
        "xla_gpu_enable_triton_gemm": False,
        # Nor does it join gradients of kernels that read the same activations, which it would first have to copy.
        "xla_gpu_dot_merger_threshold_mb": 0,
    }


def compile_train_step(recipe: Recipe, state: TrainState) -> jax.stages.Compiled:
    """The traced step, compiled ahead of time."""
    return trace_train_step(recipe, state).lower().compile(compiler_options=compiler_options(recipe))


def compile_eval_step(recipe: Recipe, model: ViT) -> jax.stages.Compiled:
    """`eval_step` compiled ahead of time for an abstract model, as a function of model and batch."""
    batch = abstract_batch(recipe)
    batch["mask"] = jax.ShapeDtypeStruct(batch["label"].shape, jnp.float32, sharding=batch["label"].sharding)
    return jax.jit(functools.partial(eval_step, recipe)).lower(model, batch).compile()


def eval_step(recipe: Recipe, model: ViT, batch: dict) -> ClassificationSums:
    """Sums over one padded validation batch: 'image', 'label' as in training, 'mask' fp32 (B,)."""
    logits_BC = model(normalize(batch["image"], recipe.data)).logits
    return classification_sums(logits_BC, batch["label"], batch["mask"], recipe.loss)
