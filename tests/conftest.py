"""What all tests share: eight simulated CPU devices, meshes on them, and parameters by name."""

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling, and machine code that is not optimized takes half of it. Eight devices on two
# busy cores can keep one another waiting for longer than the 40 s after which XLA gives up.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from teachers import train_teachers

from vit22b.config import DataConfig, Recipe
from vit22b.model_config import ModelConfig
from vit22b.sharding import AXES, BATCH, make_mesh
from vit22b.step import init_state, loss_and_gradients

# A device that has reached a collective holds a thread until all the others have. Dispatched asynchronously,
# two programs can run at once and, with fewer threads than devices, each wait forever for threads of the other.
jax.config.update("jax_cpu_enable_async_dispatch", False)

MeshFactory = Callable[[int, int, int], contextlib.AbstractContextManager[Mesh]]


@pytest.fixture(scope="session")
def mesh() -> MeshFactory:
    """`with mesh(replica, data, model) as m:` puts a mesh of the first simulated devices in force."""

    @contextlib.contextmanager
    def on_mesh(replica: int = 1, data: int = 1, model: int = 1) -> Iterator[Mesh]:
        shape = (replica, data, model)
        m = make_mesh(shape, jax.devices()[: math.prod(shape)])
        with jax.set_mesh(m):
            yield m

    return on_mesh


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return train_teachers(tmp_path_factory.mktemp("teachers"))


def named(tree) -> dict:
    """A model's parameters, or what has their structure, by the path of attributes: 'blocks/attention/query'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="/"): leaf for path, leaf in leaves}


def loss_and_named_gradients(config: ModelConfig, shape: tuple[int, int, int], mesh: MeshFactory) -> tuple[float, dict]:
    """Of one batch of random images; the classifier is not zero, so that gradients reach the blocks."""
    recipe = Recipe(
        name="t", total_steps=1, batch_size=8, model=config, data=DataConfig(train="digits", validation="digits")
    )
    rng = np.random.default_rng(2)
    batch = {
        "image": rng.integers(0, 256, (8, config.image_size, config.image_size, 3), dtype=np.uint8),
        "label": rng.integers(0, config.num_classes, 8, dtype=np.int32),
    }
    with mesh(*shape) as m:
        model = jax.jit(functools.partial(init_state, recipe))().model
        head = rng.normal(size=model.head_kernel.shape).astype(np.float32)
        model.head_kernel[...] = jax.device_put(head, model.head_kernel[...].sharding)
        placed = {name: jax.device_put(x, NamedSharding(m, BATCH)) for name, x in batch.items()}
        (loss, _), gradients = jax.jit(functools.partial(loss_and_gradients, recipe))(model, placed, jax.random.key(0))
        return float(loss), {name: np.asarray(leaf) for name, leaf in named(gradients).items()}


def assert_same_gradients(actual: dict, expected: dict) -> None:
    """By name, to 2e-5 of each one's largest value; none is zero."""
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=2e-5 * scale, err_msg=name)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """A context in which functions are lowered as for a GPU; none takes part."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    platform = {"platform": "gpu"} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, **platform)
    types = (AxisType.Explicit,) * len(AXES)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
