"""The attention kernel, interpreted, against NumPy in float64; and where it is chosen."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, on_a_gpu
from jax.sharding import NamedSharding, get_abstract_mesh

from vit22b import layers
from vit22b.kernels import attention as kernel
from vit22b.kernels import hopper
from vit22b.sharding import HEADS

needs_kernel = pytest.mark.skipif(not hopper.AVAILABLE, reason="needs JAX 0.11, which has what the kernel is made of")


def expected(q, k, v, grad):
    """Attention and the gradients of its arguments."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    products = np.einsum("btnh,bsnh->bnts", grad, v)
    grad_scores = weights * (products - (weights * products).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bnts,bsnh->btnh", weights, v),
        np.einsum("bnts,bsnh->btnh", grad_scores, k),
        np.einsum("bnts,btnh->bsnh", grad_scores, q),
        np.einsum("bnts,btnh->bsnh", weights, grad),
    )


@needs_kernel
@pytest.mark.parametrize(
    ("length", "head_dim", "programs"),
    [(196, 64, 1), (197, 40, 2), (100, 64, 4), (130, 56, 2), (8, 64, 1), (256, 72, 2), (196, 72, 1), (225, 88, 1)],
)
def test_matches_float64(length, head_dim, programs, monkeypatch):
    """Several heads per thread block, so that both slots of shared memory are used again."""
    monkeypatch.setattr(hopper, "PROGRAMS", programs)
    keys = jax.random.split(jax.random.key(length), 4)
    q, k, v, grad = (2 * jax.random.normal(key, (2, length, 2, head_dim), jnp.bfloat16) for key in keys)
    out, back = jax.vjp(kernel.attention, q, k, v)
    wanted = expected(*(np.asarray(x, np.float64) for x in (q, k, v, grad)))
    for found, right in zip((out, *back(grad)), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(found, np.float64) - right) < 1e-2 * np.linalg.norm(right)


@needs_kernel
@pytest.mark.parametrize(("length", "head_dim"), [(200, 64), (256, 72)])
def test_barriers_order_accesses_of_shared_memory(
    length: int, head_dim: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As far as the interpreter knows of any: to it, a matmul is done at once."""
    monkeypatch.setattr(hopper, "PROGRAMS", 1)
    monkeypatch.setattr(hopper, "InterpretGPUParams", functools.partial(hopper.InterpretGPUParams, detect_races=True))
    x = jnp.ones((3, length, 1, head_dim), jnp.bfloat16)
    out, back = jax.vjp(kernel.attention, x, x, x)
    jax.block_until_ready(back(out))
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_kernel
def test_large_scores(monkeypatch):
    """Softmax without overflow, where the scores of keys beyond the last one, all 0, are far above the others."""
    monkeypatch.setattr(hopper, "PROGRAMS", 2)
    q = jnp.full((1, 70, 2, 64), 8.0, jnp.bfloat16)
    k = -q + jax.random.normal(jax.random.key(0), q.shape, jnp.bfloat16)
    v, grad = (jax.random.normal(jax.random.key(i), q.shape, jnp.bfloat16) for i in (1, 2))
    out, back = jax.vjp(kernel.attention, q, k, v)
    wanted = expected(*(np.asarray(x, np.float64) for x in (q, k, v, grad)))
    found = [np.asarray(x, np.float64) for x in (out, *back(grad))]
    assert all(np.isfinite(x).all() for x in found)
    for index in (0, 3):  # the other two are small differences of what rounding has made uncertain
        assert np.linalg.norm(found[index] - wanted[index]) < 2e-2 * np.linalg.norm(wanted[index])


@needs_kernel
@pytest.mark.parametrize(
    "shape", [(256, 196, 16, 64), (1, 256, 1, 64), (1, 193, 1, 64), (1, 256, 1, 72), (1, 256, 1, 88)]
)
def test_fits(shape):
    assert kernel.fits(shape)
    assert not kernel.fits(shape, jnp.float32)


@pytest.mark.parametrize("shape", [(1, 257, 1, 64), (1, 256, 1, 80), (1, 192, 1, 64), (1, 192, 1, 72)])
def test_does_not_fit(shape):
    assert not kernel.fits(shape)


@needs_kernel
@pytest.mark.parametrize(("length", "head_dim"), [(72, 64), (200, 72), (256, 88)])
def test_layers_share_the_kernels_that_are_compiled(
    length: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU; a kernel per layer would take seconds of compilation each."""

    def three_layers(x):
        for _ in range(3):
            x = layers.dot_product_attention(x, x, x, "pallas")
        return jnp.sum(x.astype(jnp.float32))

    with on_a_gpu(monkeypatch):
        # No other test's shape: what is traced for a GPU is kept.
        x = jax.ShapeDtypeStruct(
            (3, length, 5, head_dim), jnp.bfloat16, sharding=NamedSharding(get_abstract_mesh(), HEADS)
        )
        text = jax.jit(jax.grad(three_layers)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    hashes = re.findall(r'kernel_hash = "[^"]*"', text)
    assert len(set(hashes)) == 2  # forward, backward
    assert text.count("call @mosaic_gpu") == len(hashes)


def device(capability: str) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.mark.parametrize(
    ("capability", "shape", "dtype", "expected"),
    [
        ("9.0", (2, 196, 4, 64), "bfloat16", "pallas"),
        ("9.0", (2, 197, 4, 64), "bfloat16", "pallas"),
        ("9.0", (2, 256, 4, 72), "bfloat16", "pallas"),
        ("9.0", (2, 256, 4, 80), "bfloat16", "cudnn"),
        ("9.0", (2, 576, 4, 64), "bfloat16", "cudnn"),
        ("9.0", (2, 577, 4, 64), "bfloat16", "xla"),
        ("9.0", (2, 256, 4, 128), "bfloat16", "cudnn"),
        ("8.0", (2, 196, 4, 64), "bfloat16", "cudnn"),
        ("8.0", (2, 197, 4, 64), "bfloat16", "xla"),
        ("9.0", (2, 196, 4, 64), "float32", "xla"),
    ],
)
def test_the_fastest_implementation_that_applies_is_chosen(
    capability: str, shape: tuple, dtype: str, expected: str, mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    with mesh(1, 1, 2) as m:  # two heads to a device
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(m, HEADS))
        monkeypatch.setattr(layers.jax, "devices", lambda: [device(capability)])
        monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
        jax.eval_shape(lambda x: found.append(layers.fastest_attention(x)), x)
    without = {"pallas": "cudnn" if shape[1] % 2 == 0 else "xla"}
    assert found == [expected if hopper.AVAILABLE else without.get(expected, expected)]
