"""Softmax regression by SGD, all heads of a grid in one pass over the features.

Heads that read the same feature share one matmul per step, whatever their settings: learning rate, weight decay and
number of epochs are vectors over heads. Each head does exactly what it would alone, since all start from the same
kernel and see the same batches.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vit22b.probing.config import ProbeConfig
from vit22b.probing.heads import Heads, logits
from vit22b.probing.rows import Column, Features, part
from vit22b.train import place

INITIAL_DEVIATION = 0.01  # of kernels, as DINOv2's


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a head of the grid is trained with."""

    feature: str
    learning_rate: float
    weight_decay: float
    epochs: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias", "momenta"], meta_fields=[])
@dataclasses.dataclass
class State:
    """Of all heads of one feature, fp32, replicated."""

    kernel: jax.Array  # H D C
    bias: jax.Array  # H C
    momenta: tuple[jax.Array, jax.Array]  # like kernel and bias


def grid(config: ProbeConfig) -> list[Setting]:
    """Every combination that the flags name."""
    combinations = itertools.product(config.features, config.learning_rates, config.weight_decays, config.epochs)
    return [Setting(*values) for values in combinations]


def setting_of(settings: dict[str, object]) -> Setting:
    """What a head of `train` was trained with; its number of steps follows from the rows."""
    return Setting(**{field.name: settings[field.name] for field in dataclasses.fields(Setting)})  # type: ignore[arg-type]


def train(
    settings: list[Setting],
    stream: Iterator[dict[str, jax.Array]],
    widths: dict[str, int],
    num_classes: int,
    num_images: int,
    config: ProbeConfig,
) -> list[Heads]:
    """Trains every setting on `stream`, whose batches have each feature, (B, D), and 'label', (B,); B is fixed.

    An epoch is `num_images` / B steps; the stream must last for that of the longest setting. Returns the heads of each
    feature, in the order of `settings`; theirs have 'steps' too.
    """

    def steps_of(setting: Setting) -> int:
        return num_steps(setting.epochs, num_images, config.batch_size)

    states, rates, decays, steps = {}, {}, {}, {}
    of_feature = {
        name: [s for s in settings if s.feature == name] for name in dict.fromkeys(s.feature for s in settings)
    }
    for name, members in of_feature.items():
        states[name] = initial(len(members), widths[name], num_classes, config.seed)
        rates[name] = jnp.array([s.learning_rate for s in members], jnp.float32)
        decays[name] = jnp.array([s.weight_decay for s in members], jnp.float32)
        steps[name] = jnp.array([steps_of(s) for s in members], jnp.float32)
    for step, batch in zip(range(max(map(steps_of, settings))), stream, strict=False):
        states = update(states, batch, rates, decays, steps, jnp.float32(step), config.momentum)
    return [
        Heads(
            name,
            [dataclasses.asdict(s) | {"steps": steps_of(s)} for s in members],
            states[name].kernel,
            states[name].bias,
        )
        for name, members in of_feature.items()
    ]


def num_steps(epochs: int, num_images: int, batch_size: int) -> int:
    return max(epochs * num_images // batch_size, 1)


def initial(heads: int, width: int, num_classes: int, seed: int) -> State:
    """The same kernel for every head."""
    kernel = INITIAL_DEVIATION * jax.random.normal(jax.random.key(seed), (width, num_classes))
    kernel, bias = jnp.tile(kernel, (heads, 1, 1)), jnp.zeros((heads, num_classes))
    return State(kernel, bias, (jnp.zeros_like(kernel), jnp.zeros_like(bias)))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="momentum")
def update(
    states: dict[str, State],
    batch: dict[str, jax.Array],
    rates: dict[str, jax.Array],
    decays: dict[str, jax.Array],
    steps: dict[str, jax.Array],
    step: jax.Array,
    momentum: float,
) -> dict[str, State]:
    """One step of every head; a head whose steps are over stays as it is. Momentum as PyTorch's: m = mu m + g."""
    new = {}
    for name, state in states.items():
        x_BD, labels_B = batch[name], batch["label"]
        size, num_classes = x_BD.shape[0], state.bias.shape[1]
        probabilities = jax.nn.softmax(logits(state.kernel, state.bias, x_BD))
        # The gradient of the mean cross-entropy with respect to the logits.
        error_BHC = (probabilities - jax.nn.one_hot(labels_B, num_classes)[:, None]) / size
        kernel_gradient = jnp.einsum(
            "bd,bhc->hdc",
            x_BD,
            error_BHC.astype(x_BD.dtype),
            precision=jax.lax.Precision.HIGHEST if x_BD.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
            out_sharding=P(),
        )
        bias_gradient = jnp.einsum("bhc->hc", error_BHC, out_sharding=P())
        rate_H = rates[name] * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / steps[name], 1)))
        kernel_momentum = momentum * state.momenta[0] + kernel_gradient + decays[name][:, None, None] * state.kernel
        bias_momentum = momentum * state.momenta[1] + bias_gradient
        new[name] = State(
            state.kernel - rate_H[:, None, None] * kernel_momentum,
            state.bias - rate_H[:, None] * bias_momentum,
            (kernel_momentum, bias_momentum),
        )
    return new


def stored_batches(
    features: Features, rows: np.ndarray, names: list[str], config: ProbeConfig
) -> Iterator[dict[str, jax.Array]]:
    """Batches of stored features without end: each epoch is a permutation of `rows`, and a batch may span two.

    Read a batch ahead, in the background.
    """
    columns: dict[str, Column] = {name: features.columns[name] for name in names} | {"label": features.labels}
    chosen = epochs(rows, config.batch_size, config.seed)
    with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
        ahead = pool.submit(part, columns, next(chosen), config.batch_size)
        while True:
            batch, ahead = ahead.result(), pool.submit(part, columns, next(chosen), config.batch_size)
            yield place(batch)


def epochs(rows: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """`batch_size` of `rows` at a time, without end: one permutation after the other."""
    waiting = np.empty(0, rows.dtype)
    for epoch in itertools.count():
        waiting = np.concatenate([waiting, np.random.default_rng((seed, epoch)).permutation(rows)])
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]
