"""The attention kernel, interpreted, against NumPy in float64; and where it is chosen."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, loss_and_named_gradients, on_a_gpu
from jax.sharding import NamedSharding, get_abstract_mesh

from vit22b import layers
from vit22b.kernels import attention as kernel
from vit22b.kernels import hopper, norms
from vit22b.model import abstract_model
from vit22b.model_config import ModelConfig
from vit22b.sharding import HEADS

needs_kernel = pytest.mark.skipif(not hopper.AVAILABLE, reason="needs JAX 0.11, which has what the kernel is made of")


NORMED = ModelConfig(
    width=128,
    depth=1,
    mlp_dim=64,
    num_heads=2,
    num_classes=10,
    image_size=16,
    patch_size=4,
    pool="gap",
    kernels="pallas",
    attention="pallas",
)


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


def normalised(x, scale, epsilon):
    """RMSNorm over the last dimension, and a function from its gradient to those of x and scale."""
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)

    def pullback(grad):
        through_root = -(grad * scale * x / root**2).sum(axis=-1, keepdims=True) * x / root / x.shape[-1]
        return grad * scale / root + through_root, (grad * x / root).sum(axis=(0, 1, 2))

    return x / root * scale, pullback


def arguments_with_norm(length: int, head_dim: int) -> tuple[list[jax.Array], jax.Array]:
    """Of `attention`, without epsilon, and a gradient of its result."""
    keys = jax.random.split(jax.random.key(length), 6)
    q, k, v, grad = (2 * jax.random.normal(key, (2, length, 2, head_dim), jnp.bfloat16) for key in keys[:4])
    scales = [1 + jax.random.normal(key, (head_dim,)) / 4 for key in keys[4:]]
    return [q, k, v, scales[0].at[3].set(0.0), scales[1].at[-1].set(0.0)], grad


@needs_kernel
@pytest.mark.parametrize(
    ("length", "head_dim", "programs"),
    [(196, 64, 1), (256, 64, 2), (100, 40, 4), (8, 64, 1)],
)
def test_norm_matches_float64(length: int, head_dim: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a scale is 0."""
    monkeypatch.setattr(hopper, "PROGRAMS", programs)
    arguments, grad = arguments_with_norm(length, head_dim)
    out, back = jax.vjp(lambda *a: kernel.normed_attention(*a, 1e-2), *arguments)
    q, k, v, query_scale, key_scale = (np.asarray(x, np.float64) for x in arguments)
    query, query_pullback = normalised(q, query_scale, 1e-2)
    key, key_pullback = normalised(k, key_scale, 1e-2)
    wanted_out, dq, dk, dv = expected(query, key, v, np.asarray(grad, np.float64))
    (dq, dquery_scale), (dk, dkey_scale) = query_pullback(dq), key_pullback(dk)
    wanted = wanted_out, dq, dk, dv, dquery_scale, dkey_scale
    for found, right, like in zip((out, *back(grad)), wanted, (v, *arguments), strict=True):
        assert found.dtype == (jnp.bfloat16 if found.ndim == 4 else jnp.float32)
        assert found.shape == like.shape
        assert np.linalg.norm(np.asarray(found, np.float64) - right) < 1e-2 * np.linalg.norm(right)


@needs_kernel
@pytest.mark.parametrize(("length", "head_dim"), [(66, 64), (200, 40)])
def test_norm_equals_the_norm_kernels(length: int, head_dim: int) -> None:
    """To the last bit."""
    arguments, grad = arguments_with_norm(length, head_dim)
    arguments[:3], grad = [x[:1, :, :1] for x in arguments[:3]], grad[:1, :, :1]

    def apart(q, k, v, query_scale, key_scale):
        q, k = norms.norm(q, query_scale, None, False, 1e-2), norms.norm(k, key_scale, None, False, 1e-2)
        return kernel.attention(q, k, v)

    out, back = jax.vjp(lambda *a: kernel.normed_attention(*a, 1e-2), *arguments)
    out_apart, back_apart = jax.vjp(apart, *arguments)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(out_apart, np.float32))
    for found, other in zip(back(grad), back_apart(grad), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(other, np.float32))


@needs_kernel
@pytest.mark.parametrize(("length", "head_dim", "norm"), [(200, 64, False), (200, 64, True), (256, 72, False)])
def test_barriers_order_accesses_of_shared_memory(
    length: int, head_dim: int, norm: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As far as the interpreter knows of any: to it, a matmul is done at once."""
    monkeypatch.setattr(hopper, "PROGRAMS", 1)
    monkeypatch.setattr(hopper, "InterpretGPUParams", functools.partial(hopper.InterpretGPUParams, detect_races=True))
    x = jnp.ones((3, length, 1, head_dim), jnp.bfloat16)
    attend = functools.partial(kernel.normed_attention, epsilon=1e-6) if norm else kernel.attention
    out, back = jax.vjp(attend, x, x, x, *([jnp.ones(head_dim)] * 2 if norm else []))
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
@pytest.mark.parametrize(
    ("length", "head_dim", "norm"), [(72, 64, False), (72, 64, True), (200, 72, False), (256, 88, False)]
)
def test_layers_share_the_kernels_that_are_compiled(
    length: int, head_dim: int, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU; a kernel per layer would take seconds of compilation each."""
    scales = jnp.ones((3, head_dim))

    def three_layers(x):
        for scale in scales:
            if norm:
                x = layers.normed_attention(x, x, x, *[SimpleNamespace(scale=scale, config=NORMED)] * 2)
            else:
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


@needs_kernel
def test_a_model_with_norms_within_attention_equals_one_with_norms_apart(
    mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    within, found = loss_and_named_gradients(NORMED, (1, 1, 1), mesh)
    monkeypatch.setattr(layers, "norms_in_attention", lambda *_: False)
    apart, others = loss_and_named_gradients(NORMED, (1, 1, 1), mesh)
    assert within == apart
    for name, other in others.items():
        np.testing.assert_array_equal(found[name], other, name)


@needs_kernel
def test_scales_of_norms_within_attention_get_gradients_of_all_devices(
    mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an equivalent in place of the kernels, which are interpreted on one device only."""

    def equivalent(q, k, v, query_scale, key_scale, epsilon):
        q, k = (norms.norm(x, scale, None, False, epsilon) for x, scale in ((q, query_scale), (k, key_scale)))
        return jax.nn.dot_product_attention(q, k, v)

    monkeypatch.setattr(kernel, "normed_attention", equivalent)
    _, found = loss_and_named_gradients(NORMED, (1, 2, 2), mesh)
    _, others = loss_and_named_gradients(NORMED, (1, 1, 1), mesh)
    for name, other in others.items():
        assert np.linalg.norm(found[name] - other) < 2.0**-5 * np.linalg.norm(other), name


@needs_kernel
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"kernels": "xla"}, False),
        ({"attention": "xla"}, False),
        ({"norm": "layer"}, False),
        ({"norm_bias": True}, False),
        ({"qk_norm": "width"}, False),
        ({"qk_norm": "none"}, False),
        ({"position": "rope"}, False),
        ({"width": 144}, False),
    ],
)
def test_norms_are_within_attention_where_that_applies(
    changes: dict, expected: bool, mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("attention", "normed_attention"):

        def attend(q, *_, name=name, **__):
            taken.append(name)
            return q

        monkeypatch.setattr(kernel, name, attend)
    with mesh(1, 1, 1):
        images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        jax.eval_shape(lambda m, x: m(x).logits, abstract_model(dataclasses.replace(NORMED, **changes)), images)
    assert ("normed_attention" in taken) == expected
