"""fp8 in whole models and in training, and what is refused."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import MeshFactory, named
from jax.extend import core
from jax.sharding import NamedSharding

from launch import tpu
from vit22b import data, sharding
from vit22b.config import DataConfig, OptimConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.flops import subjaxprs
from vit22b.hardware import multiplies_fp8
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
from vit22b.step import init_state, loss_and_gradients, train_step

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2

MODEL = ModelConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=8, image_size=8, patch_size=4, matmul="fp8"
)  # fmt: skip


def recipe(model: ModelConfig = MODEL, **fields) -> Recipe:
    digits = DataConfig(train="digits", validation="digits")
    return Recipe(**{"name": "t", "total_steps": 1, "batch_size": 8, "model": model, "data": digits, **fields})


def fp8_dots(jaxpr: core.Jaxpr) -> list[tuple]:
    """The dtypes of the operands of every matmul with an fp8 operand."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(v.aval.dtype for v in equation.invars))
        for inner in subjaxprs(equation):
            found += fp8_dots(inner)
    return [dtypes for dtypes in found if any(dtype.itemsize == 1 for dtype in dtypes)]


@pytest.mark.parametrize("changes", [{}, {"block": "sequential", "mlp": "swiglu"}])
def test_all_three_matmuls_of_the_blocks_linear_layers_are_fp8_and_no_others(changes: dict, mesh: MeshFactory) -> None:
    """Attention pooling and the classifier stay as they are. Conversions to fp8 are one for each tensor: what several
    matmuls read is quantized once, in the forward as in the backward pass. But for what attention and an MLP with GELU
    have in common, the norm and the gradient of their sum: both quantize it in the same way, and compilers merge that.
    """
    config = dataclasses.replace(MODEL, scan_unroll=2, **changes)
    given = recipe(config)
    with mesh():
        model = jax.eval_shape(lambda: ViT(config, jax.random.key(0)))
        batch = {"image": jnp.zeros((8, 8, 8, 3), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}
        traced = jax.make_jaxpr(functools.partial(loss_and_gradients, given))(model, batch, jax.random.key(0))
    kernels = 7 if config.mlp == "swiglu" else 6
    dots = fp8_dots(traced.jaxpr)
    assert len(dots) == 3 * kernels * config.depth
    forward = {jnp.dtype(E4M3)}
    assert sum(set(dtypes) == forward for dtypes in dots) == kernels * config.depth
    assert sum(set(dtypes) == {*forward, jnp.dtype(E5M2)} for dtypes in dots) == 2 * kernels * config.depth
    # Per layer: the kernels, what they read and the gradients of what they write.
    norms = 2 if config.block == "sequential" else 1
    inward = kernels - 2
    tensors = kernels + (norms + 2) + (inward + norms)
    if config.block == "parallel":
        tensors += 2
    converted = str(traced).count("new_dtype=float8")
    assert converted == tensors * config.depth


@functools.cache
def parameters(pool: str) -> list[np.ndarray]:
    """Of `MODEL` on one device, with the mesh in force; created once, for the sake of the compiler's time."""
    config = dataclasses.replace(MODEL, pool=pool)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(lambda: ViT(config, jax.random.key(0)))())]


def loss_and_named_gradients(given: Recipe, shape: tuple, mesh: MeshFactory, poison: float | None = None):
    """Of one batch of random images; the classifier is not zero, so that gradients reach the blocks."""
    rng = np.random.default_rng(2)
    batch = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, 8, 8, dtype=np.int32),
    }
    with mesh(*shape) as m:
        abstract = sharding.concrete(jax.eval_shape(lambda: ViT(given.model, jax.random.key(0))), m)
        leaves, treedef = jax.tree.flatten(abstract)
        created = zip(parameters(given.model.pool), leaves, strict=True)
        model = jax.tree.unflatten(treedef, [jax.device_put(x, leaf.sharding) for x, leaf in created])
        head = rng.normal(size=model.head_kernel.shape).astype(np.float32)
        model.head_kernel[...] = jax.device_put(head, model.head_kernel[...].sharding)
        if poison is not None:
            up = np.array(model.blocks.mlp.up[...])
            up[1, 3, 5] = poison
            model.blocks.mlp.up[...] = jax.device_put(up, model.blocks.mlp.up[...].sharding)
        placed = {name: jax.device_put(x, NamedSharding(m, sharding.BATCH)) for name, x in batch.items()}
        (loss, _), gradients = jax.jit(functools.partial(loss_and_gradients, given))(model, placed, jax.random.key(0))
        return float(loss), {name: np.asarray(leaf) for name, leaf in named(gradients).items()}


def test_a_model_is_as_far_from_fp32_on_a_mesh_and_rematerialised_as_it_is_plain(mesh: MeshFactory) -> None:
    """Bits differ: between layers bf16 rounds differently on meshes, and fp8 then now and then to the other side."""
    config = dataclasses.replace(MODEL, pool="gap")
    exact_loss, exact = loss_and_named_gradients(recipe(dataclasses.replace(config, matmul="fp32")), (1, 1, 1), mesh)

    def error(changes: dict, shape: tuple) -> float:
        loss, gradients = loss_and_named_gradients(recipe(dataclasses.replace(config, **changes)), shape, mesh)
        assert loss == pytest.approx(exact_loss, rel=0.05)
        square = sum(np.sum((gradients[name] - exact[name]) ** 2) for name in exact)
        return float(np.sqrt(square / sum(np.sum(value**2) for value in exact.values())))

    one = error({}, (1, 1, 1))
    assert 0.02 < one < 0.2  # the first: fp8 is in there at all
    assert error({"remat": "dots"}, (2, 2, 2)) < 1.3 * one


def test_an_infinite_weight_shows_in_loss_and_gradient(mesh: MeshFactory) -> None:
    """Which a conversion to e4m3, that has no infinity, may well turn into the largest value."""
    loss, gradients = loss_and_named_gradients(recipe(dataclasses.replace(MODEL, pool="gap")), (1, 1, 1), mesh, np.inf)
    assert not np.isfinite(loss)
    assert not np.isfinite(gradients["blocks/attention/query"]).all()


def test_training_reaches_bf16s_loss(mesh: MeshFactory) -> None:
    """On digits, in two microbatches. The losses of single steps differ, those of the last ten together hardly: fp8's
    rounding is unbiased noise, small next to that of the batches.
    """
    config = dataclasses.replace(MODEL, num_classes=10, patch_size=2, pool="gap", remat="full")
    losses, steps = {}, 60
    for matmul in ("bf16", "fp8"):
        given = recipe(
            dataclasses.replace(config, matmul=matmul),
            total_steps=steps,
            batch_size=32,
            optim=OptimConfig(learning_rate=5e-3, warmup_steps=5, accumulate_steps=2),
            data=DataConfig(train="digits", validation="digits", crop="resize", flip=False, threads=1),
        )
        batches = data.train_batches(data.open_sources(given)[0], given, 0, process_index=0, process_count=1)
        with mesh():
            state = jax.jit(functools.partial(init_state, given))()
            step = jax.jit(functools.partial(train_step, given))
            metrics = []
            for _ in range(steps):
                state, values = step(state, next(batches))
                metrics.append(float(values["loss"]))
        batches.close()
        losses[matmul] = np.array(metrics)
    bf16, narrow = losses["bf16"], losses["fp8"]
    assert bf16[0] == pytest.approx(np.log(10), rel=0.01)
    assert bf16[-10:].mean() < 0.8 * bf16[0]  # it learned
    assert np.abs(narrow - bf16).max() > 1e-4  # and fp8 was something else
    assert narrow[-10:].mean() == pytest.approx(bf16[-10:].mean(), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": "rings"}, "model.overlap='rings': not with model.matmul='fp8'; use model.overlap=none or"),
        ({"matmul": "fp4"}, "model.matmul='fp4': choose one of bf16, fp32, fp8"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        dataclasses.replace(MODEL, **changes).validate()
    assert message in str(caught.value)


def test_cudnn_attention_goes_with_fp8_and_not_with_fp32() -> None:
    dataclasses.replace(MODEL, attention="cudnn").validate()
    with pytest.raises(RecipeError, match=r"'cudnn': needs model.matmul='bf16' or 'fp8'"):
        dataclasses.replace(MODEL, attention="cudnn", matmul="fp32").validate()


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "expected"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("gpu", "NVIDIA L40S", "8.9", True),
        ("gpu", "NVIDIA H200", "9.0", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "AMD Instinct MI300X", "gfx942", False),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU7x", None, True),
        ("cpu", "cpu", None, True),
    ],
)
def test_devices_without_fp8_matmuls_are_refused_first(platform, kind, capability, expected, tmp_path, monkeypatch):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability or "")
    assert multiplies_fp8(device) == expected

    class NextCheckError(Exception):
        pass

    def next_check(given):
        raise NextCheckError

    monkeypatch.setattr(tpu.jax, "devices", lambda: [device])
    monkeypatch.setattr(tpu, "check_state_memory", next_check)
    with pytest.raises(NextCheckError if expected else RecipeError) as caught:
        tpu.run(recipe(), tmp_path / "run")
    if not expected:
        assert str(caught.value).startswith(f"model.matmul='fp8': {kind} has no fp8 matmuls")
        assert "\n" not in str(caught.value)
