"""One step of training or evaluation: pure functions of state and batch, and the state itself.

Randomness of a step comes from (seed, step) alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit22b.config import Recipe
from vit22b.metrics import ClassificationSums, classification_sums
from vit22b.mix import normalize
from vit22b.model import ViT
from vit22b.objective import Supervised, on_mesh
from vit22b.optim import clip, make_optimizer, schedule
from vit22b.sharding import BATCH


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "model", "opt_state", "ema"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """Everything a step changes. `step` counts finished steps, int32; `ema` is None where it is off.

    `model` is what the recipe's objective trains: a ViT, or several models.
    """

    step: jax.Array
    model: Any
    opt_state: optax.OptState
    ema: Any

    @property
    def eval_model(self) -> Any:
        return self.model if self.ema is None else self.ema


def init_state(recipe: Recipe) -> TrainState:
    """A fresh state. To be called under `jax.jit` or `jax.eval_shape` with the mesh set: it is created sharded."""
    model = recipe.objective().init(jax.random.fold_in(jax.random.key(recipe.seed), 0))
    opt_state = make_optimizer(recipe.optim, recipe.total_steps).init(model)
    ema = jax.tree.map(jnp.copy, model) if recipe.optim.ema_decay else None
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=opt_state, ema=ema)


def abstract_state(recipe: Recipe) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh in force, real or abstract; allocates nothing."""
    return jax.eval_shape(functools.partial(init_state, recipe))


def loss_and_gradients(recipe: Recipe, trained: Any, batch: dict, key: jax.Array) -> tuple[tuple, Any]:
    """Of a batch, over `accumulate_steps` microbatches in turn: what the objective's loss gives, and gradients."""
    value_and_grad = jax.value_and_grad(recipe.objective().loss, has_aux=True)
    count = recipe.optim.accumulate_steps
    if count == 1:
        return value_and_grad(trained, batch, key)

    def split(x):  # every count-th example, which each device has: no example moves
        x = jax.lax.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=BATCH)
        return jnp.moveaxis(x, 1, 0)

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, value_and_grad(trained, *inputs)), None

    inputs = (jax.tree.map(split, batch), jax.random.split(key, count))
    means, _ = jax.eval_shape(lambda each: value_and_grad(trained, *jax.tree.map(lambda x: x[0], each)), inputs)
    zero = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means), jax.tree.map(jnp.zeros_like, trained))
    total, _ = jax.lax.scan(add, zero, inputs)
    return jax.tree.map(lambda x: x / count, total)


def train_step(recipe: Recipe, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Metrics are fp32 scalars: 'loss', 'gradient_norm', 'learning_rate', and what the objective adds.

    Where loss or gradient is not finite the state keeps its values, apart from the step.
    """
    (loss, more), gradients = loss_and_gradients(recipe, state.model, batch, step_key(recipe, state.step))
    with jax.named_scope("optimizer"):
        gradients, norm = clip(gradients, recipe.optim.clip_norm, recipe.model.unrolled)
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
    return state, {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate, **more}


def step_key(recipe: Recipe, step: jax.Array) -> jax.Array:
    """What is random in a step, `step` having been finished before it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), 1), step)


def trace_train_step(recipe: Recipe, state: TrainState) -> jax.stages.Traced:
    """The train step for an abstract state on the mesh in force; the state given to it is donated."""
    return jax.jit(functools.partial(train_step, recipe), donate_argnums=0).trace(state, recipe.objective().batch())


def compiler_options(recipe: Recipe) -> dict[str, bool | int | str]:
    """XLA's options for the train step on the devices in use, beside those in XLA_FLAGS."""
    options: dict[str, bool | int | str] = {}
    if jax.default_backend() != "gpu":
        return options
    if recipe.model.matmul == "fp8":
        # XLA tries its Triton matmuls for each fp8 one: minutes of compilation, and cuBLASLt's were faster on an H200.
        options["xla_gpu_enable_triton_gemm"] = False
    if recipe.model.matmul == "fp8" or recipe.model.overlap == "halves":
        # XLA would join matmuls that read the same array: gradients of kernels, which it has to copy for that, and
        # those of the two halves, which then could not take turns.
        options["xla_gpu_dot_merger_threshold_mb"] = 0
    return options


def compile_train_step(recipe: Recipe, state: TrainState) -> jax.stages.Compiled:
    """The traced step, compiled ahead of time."""
    return trace_train_step(recipe, state).lower().compile(compiler_options=compiler_options(recipe))


def compile_eval_step(recipe: Recipe, model: ViT) -> jax.stages.Compiled:
    """`eval_step` compiled ahead of time for an abstract model, as a function of model and batch."""
    batch = Supervised(recipe).batch() | {"mask": on_mesh((recipe.batch_size,), jnp.float32)}
    return jax.jit(functools.partial(eval_step, recipe)).lower(model, batch).compile()


def eval_step(recipe: Recipe, model: ViT, batch: dict) -> ClassificationSums:
    """Sums over one padded validation batch: 'image', 'label' as in training, 'mask' fp32 (B,)."""
    logits_BC = model(normalize(batch["image"], recipe.data)).logits
    return classification_sums(logits_BC, batch["label"], batch["mask"], recipe.loss)
