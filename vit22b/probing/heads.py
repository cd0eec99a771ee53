"""Linear classifiers of one feature, many at once: what every way of training them gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vit22b.config import LossConfig
from vit22b.metrics import ClassificationSums, classification_sums
from vit22b.probing.rows import Features, batches
from vit22b.sharding import BATCH

BATCH_SIZE = 1024  # rows that are evaluated at a time


@dataclasses.dataclass(frozen=True)
class Heads:
    """`logits[h] = x kernel[h] + bias[h]`, x being the feature's rows."""

    feature: str
    settings: list[dict[str, object]]  # of each head: what it was trained with, by the names of the flags
    kernel: jax.Array  # H D C, fp32, replicated
    bias: jax.Array  # H C

    def one(self, index: int) -> "Heads":
        """A head by itself."""
        return dataclasses.replace(
            self,
            settings=[self.settings[index]],
            kernel=self.kernel[index : index + 1],
            bias=self.bias[index : index + 1],
        )


@jax.jit
def logits(kernel_HDC: jax.Array, bias_HC: jax.Array, x_BD: jax.Array) -> jax.Array:
    """(B, H, C), fp32; multiplied in x's precision."""
    exact = jax.lax.Precision.HIGHEST if x_BD.dtype == jnp.float32 else None
    spec = P(*BATCH, None, None)
    out = jnp.einsum(
        "bd,hdc->bhc",
        x_BD,
        kernel_HDC.astype(x_BD.dtype),
        precision=exact,
        preferred_element_type=jnp.float32,
        out_sharding=spec,
    )
    return out + bias_HC


@jax.jit
def exact_logits(kernel_HDC: jax.Array, bias_HC: jax.Array, x_BD: jax.Array) -> jax.Array:
    """The same in fp32, for measuring: kernels rounded to bf16 cost accuracy where features have a large mean."""
    return logits(kernel_HDC, bias_HC, x_BD.astype(jnp.float32))


@jax.jit
def _sums(kernel: jax.Array, bias: jax.Array, x: jax.Array, labels: jax.Array, mask: jax.Array) -> ClassificationSums:
    measured = functools.partial(classification_sums, config=LossConfig())
    return jax.vmap(measured, in_axes=(1, None, None))(exact_logits(kernel, bias, x), labels, mask)


def measure(heads: Heads, features: Features, rows: np.ndarray) -> list[ClassificationSums]:
    """Of each head on these rows, on the host."""
    columns = {"x": features.columns[heads.feature], "label": features.labels}
    totals: ClassificationSums | None = None
    for batch in batches(columns, rows, BATCH_SIZE):
        sums = _sums(heads.kernel, heads.bias, batch["x"], batch["label"], batch["mask"]).on_host()
        totals = sums if totals is None else totals + sums
    assert totals is not None
    return [jax.tree.map(lambda x, h=h: x[h], totals) for h in range(len(heads.settings))]


def predict(heads: Heads, features: Features, rows: np.ndarray) -> np.ndarray:
    """Logits of the only head on these rows, (M, C), fp32, on the host of every process."""
    assert len(heads.settings) == 1
    found = []
    for batch in batches({"x": features.columns[heads.feature]}, rows, BATCH_SIZE):
        whole = jax.sharding.reshard(exact_logits(heads.kernel, heads.bias, batch["x"]), P())
        found.append(np.asarray(whole)[:, 0])
    return np.concatenate(found)[: len(rows)]
