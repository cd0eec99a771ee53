"""Pallas kernels of norms and activations, interpreted on the CPU, against NumPy in fp64 and against XLA."""

import dataclasses
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory, loss_and_named_gradients, on_a_gpu

from vit22b.config import DataConfig, Recipe
from vit22b.hardware import runs_triton
from vit22b.kernels import activations, norms, tiles
from vit22b.model_config import ModelConfig
from vit22b.step import init_state

# bf16 has 8 bits of mantissa: rounding a result errs by 2^-9 of it at most, by about 2^-9 / sqrt(3) on average.
ROUNDING = 2.0**-9


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Random values that bf16 represents."""
    values = np.random.default_rng(seed).normal(size=shape) * scale + offset
    return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float64)


def numpy_norm(x, scale, bias, grad, centred: bool, epsilon: float) -> dict[str, np.ndarray]:
    """Value and gradients by the chain rule through mean, variance and quotient, one after another."""
    width = x.shape[-1]
    mean = x.mean(-1, keepdims=True) if centred else 0.0
    d = x - mean
    variance = (d * d).mean(-1, keepdims=True)
    root = np.sqrt(variance + epsilon)
    y = d / root
    rows = tuple(range(x.ndim - 1))
    g = grad * scale
    grad_d = g / root
    grad_variance = (-0.5 * g * d / root**3).sum(-1, keepdims=True)
    grad_d = grad_d + grad_variance * 2 * d / width
    grad_x = grad_d - grad_d.mean(-1, keepdims=True) if centred else grad_d
    return {
        "value": y * scale + (0.0 if bias is None else bias),
        "x": grad_x,
        "scale": (grad * y).sum(rows),
        "bias": grad.sum(rows),
    }


# Rows that fill no tile, widths that are no power of two, more rows than one program takes, a row per tile.
@pytest.mark.parametrize("shape", [(3, 5, 72), (700, 24), (2, 3, 4, 64), (5, 4104)])
@pytest.mark.parametrize(("centred", "with_bias"), [(False, False), (True, True), (True, False)])
def test_norms_equal_numpys(shape: tuple[int, ...], centred: bool, with_bias: bool) -> None:
    x, grad = random(shape, 0, 2.0, 0.5), random(shape, 1)
    scale, bias = random(shape[-1:], 2, 0.3, 1.0), random(shape[-1:], 3) if with_bias else None
    expected = numpy_norm(x, scale, bias, grad, centred, 1e-3)
    vectors = [None if v is None else jnp.asarray(v, jnp.float32) for v in (scale, bias)]
    y, pullback = jax.vjp(lambda *a: norms.norm(*a, centred, 1e-3), jnp.asarray(x, jnp.bfloat16), *vectors)
    grads = pullback(jnp.asarray(grad, jnp.bfloat16))
    assert y.dtype == grads[0].dtype == jnp.bfloat16
    assert relative_error(y, expected["value"]) < ROUNDING
    assert relative_error(grads[0], expected["x"]) < ROUNDING
    assert relative_error(grads[1], expected["scale"]) < 1e-5
    if with_bias:
        assert relative_error(grads[2], expected["bias"]) < 1e-5


@pytest.mark.parametrize("width", [72, 1152])
@pytest.mark.parametrize("centred", [False, True])
def test_gradients_of_all_readers_of_a_norm_are_summed(width: int, centred: bool) -> None:
    """And the residual stream's with them, in fp32: what is rounded is the sum alone."""
    shape = (5, 7, width)
    x, grads, residual = random(shape, 0), [random(shape, i) for i in (1, 2, 3)], random(shape, 4)
    scale, bias = random(shape[-1:], 5, 0.3, 1.0), random(shape[-1:], 6)
    expected = numpy_norm(x, scale, bias, sum(grads), centred, 1e-6)
    vectors = [jnp.asarray(v, jnp.float32) for v in (scale, bias)]

    def branch(*arguments):
        stream, y, slots = norms.branch_off(*arguments, centred, 1e-6, 3)
        return stream, [norms.take(y, slot) for slot in slots]

    (stream, ys), pullback = jax.vjp(branch, jnp.asarray(x, jnp.bfloat16), *vectors)
    np.testing.assert_array_equal(np.asarray(stream, np.float64), x)
    assert all(relative_error(y, expected["value"]) < ROUNDING for y in ys)
    found = pullback((jnp.asarray(residual, jnp.bfloat16), [jnp.asarray(g, jnp.bfloat16) for g in grads]))
    assert relative_error(found[0], expected["x"] + residual) < ROUNDING
    assert relative_error(found[1], expected["scale"]) < 1e-5
    assert relative_error(found[2], expected["bias"]) < 1e-5


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


VALUES = {"gelu_tanh": tanh_gelu}


@pytest.mark.parametrize("name", activations.SLOPES)
@pytest.mark.parametrize("shape", [(3, 5, 304), (300, 24), (4, 512)])
def test_activations_equal_numpys(name: str, shape: tuple[int, ...]) -> None:
    x, bias, grad = random(shape, 0, 2.0), random(shape[-1:], 1), random(shape, 2)
    value, step = VALUES[name], 1e-5
    slope = (value(x + bias + step) - value(x + bias - step)) / (2 * step)
    y, pullback = jax.vjp(
        lambda x, b: activations.activate(x, b, name), jnp.asarray(x, jnp.bfloat16), jnp.asarray(bias, jnp.float32)
    )
    grad_x, grad_bias = pullback(jnp.asarray(grad, jnp.bfloat16))
    assert relative_error(y, value(x + bias)) < ROUNDING
    assert relative_error(grad_x, grad * slope) < ROUNDING
    assert relative_error(grad_bias, (grad * slope).sum(tuple(range(x.ndim - 1)))) < 1e-5


@pytest.mark.parametrize("name", activations.SLOPES)
def test_activations_of_extreme_values_are_finite(name: str) -> None:
    x = jnp.array([[-3e38, -1e4, -30.0, -0.0, 0.0, 30.0, 1e4, 3e38]], jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: activations.activate(x, jnp.zeros(8), name), x)
    (slope,) = pullback(jnp.ones_like(x))
    np.testing.assert_array_equal(y[0], np.where(np.asarray(x[0], np.float32) > 0, x[0], 0.0).astype(y.dtype))
    np.testing.assert_allclose(np.asarray(slope[0], np.float32), [0, 0, 0, 0.5, 0.5, 1, 1, 1], atol=1e-6)


CONFIG = ModelConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_classes=10, image_size=8, patch_size=4, pool="gap")
CONFIGS = {
    "vit22b": CONFIG,
    "layer norm": dataclasses.replace(
        CONFIG, block="sequential", norm="layer", norm_bias=True, mlp="gelu", qk_norm="width", mlp_bias=False
    ),
}


@functools.cache
def gradients(config: ModelConfig, shape: tuple[int, int, int], mesh: MeshFactory) -> dict[str, np.ndarray]:
    return loss_and_named_gradients(config, shape, mesh)[1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_models_gradients_err_with_kernels_as_much_as_without(name: str, shape: tuple, mesh: MeshFactory) -> None:
    config = CONFIGS[name]
    exact = gradients(dataclasses.replace(config, matmul="fp32"), (1, 1, 1), mesh)
    errors = {}
    for kind in ("xla", "pallas"):
        found = gradients(dataclasses.replace(config, kernels=kind), shape, mesh)
        difference = sum(float(np.square(found[n] - exact[n]).sum()) for n in exact)
        errors[kind] = math.sqrt(difference / sum(float(np.square(g).sum()) for g in exact.values()))
    assert 0 < errors["xla"] < 0.05  # bf16
    assert 0 < errors["pallas"] < 1.5 * errors["xla"]


def test_kernels_are_in_the_program_where_they_are_asked_for(mesh: MeshFactory) -> None:
    data = DataConfig(train="digits", validation="digits")
    for kind, expected in (("auto", False), ("xla", False), ("pallas", True)):
        config = dataclasses.replace(CONFIG, kernels=kind)
        recipe = Recipe(name="t", total_steps=1, batch_size=8, model=config, data=data)
        with mesh(1, 1, 1):
            model = jax.eval_shape(functools.partial(init_state, recipe)).model
            images = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
            program = str(jax.make_jaxpr(lambda m, x: m(x).logits)(model, images))
        for kernel in ("norm_forward", "activation_forward"):
            assert (kernel in program) == expected, (kind, kernel)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "9.0", True), ("gpu", "8.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", False), ("tpu", "", False)],
)
def test_kernels_are_for_gpus_that_run_triton(platform: str, capability: str, expected: bool) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert runs_triton(device) == expected


def lower_for_a_gpu(monkeypatch: pytest.MonkeyPatch, fn: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
    """The program of a function and its gradients as JAX hands it to the GPU's compiler."""

    def both(*args):
        return jax.value_and_grad(lambda *a: fn(*a).astype(jnp.float32).sum(), argnums=(0, 1))(*args)

    with on_a_gpu(monkeypatch):
        return jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_roundings_to_fp8_become_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_three(x, bias):
        one, grad = jnp.float32(1), x
        forward = activations.activate_to_fp8(x, bias, one, "gelu_tanh", jnp.float8_e4m3fn)
        backward = activations.slope_to_fp8(x, bias, grad, one, "gelu_tanh", jnp.float8_e5m2)
        return forward, backward, activations.quantize(x, one, jnp.float8_e5m2)

    with on_a_gpu(monkeypatch):
        text = jax.jit(all_three).trace(*shapes_of(304)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton(") == 3


def shapes_of(width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((1000, width), jnp.bfloat16), jax.ShapeDtypeStruct((width,), jnp.float32)


@pytest.mark.parametrize("name", activations.SLOPES)
def test_every_activation_becomes_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lower_for_a_gpu(monkeypatch, lambda x, b: activations.activate(x, b, name), *shapes_of(304))
    assert text.count("__gpu$xla.gpu.triton(") == 2  # forward and backward


@pytest.mark.parametrize("width", [72, 1024, norms.MAX_WIDTH])
@pytest.mark.parametrize("centred", [False, True])
def test_norms_of_every_width_become_triton(width: int, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lower_for_a_gpu(monkeypatch, lambda x, s: norms.norm(x, s, None, centred, 1e-6), *shapes_of(width))
    assert text.count("__gpu$xla.gpu.triton(") == 2


def test_kernels_are_not_for_what_they_cannot_count_or_load() -> None:
    def fits(shape: tuple[int, int], dtype=jnp.bfloat16) -> bool:
        found = []
        jax.eval_shape(lambda x: found.append(tiles.fits(x)), jax.ShapeDtypeStruct(shape, dtype))
        return found[0]

    assert fits((4, 64))
    assert not fits((4, 64), jnp.float32)
    assert not fits((4, 60))
    assert fits((2**21, 1016))
    assert not fits((2**21, 1024))


def test_the_benchmark_of_kernels_is_refused_without_a_gpu() -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--config", "recipes/smoke.py"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: device=cpu: runs no Triton kernels; use an NVIDIA GPU\n"
