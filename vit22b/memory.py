"""Whether a recipe fits its devices, told before anything is allocated.

First from shapes alone, at once: parameters, optimizer state, gradients. Then from the compiled step, which
knows its temporaries too.
"""

import dataclasses
import os

import jax
from jax.sharding import Mesh

from vit22b import sharding
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.hardware import GIB
from vit22b.model import ViT
from vit22b.model_config import LADDER, size
from vit22b.step import abstract_state


def device_memory(device: jax.Device) -> int:
    """Bytes that programs can use on the device; CPU devices share the machine's memory."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def state_memory(recipe: Recipe, mesh_shape: tuple[int, int, int]) -> dict[str, int]:
    """Bytes per device of 'parameters', 'gradients' and 'optimizer' (with EMA), from shapes alone."""
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(mesh_shape)):
        state = abstract_state(recipe)
        parameters = sharding.bytes_per_device(state.model)
        optimizer = sharding.bytes_per_device((state.opt_state, state.ema))
    return {"parameters": parameters, "gradients": parameters, "optimizer": optimizer}


def check_state_memory(recipe: Recipe) -> None:
    """Raises `RecipeError` where parameters, gradients and optimizer alone exceed the memory of the devices here."""
    count, device = jax.device_count(), jax.local_devices()[0]
    try:
        shape = sharding.mesh_shape(recipe.mesh, count)
    except RecipeError:  # a mesh for other devices: judge by the most even split of these
        shape = (1, count, 1)
    available = device_memory(device)
    parts = state_memory(recipe, shape)
    if sum(parts.values()) <= available:
        return
    fitting = {name: batch for name in LADDER if (batch := fitting_batch(at_size(recipe, name), shape, available))}
    name, batch = list(fitting.items())[-1] if fitting else (next(iter(LADDER)), count)
    raise RecipeError(
        f"model.width={recipe.model.width}, model.depth={recipe.model.depth}: needs at least "
        f"{sum(parts.values()) / GIB:.1f} GiB per device ("
        + ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
        + f"); each of the {count} {device.device_kind} device(s) here has {available / GIB:.1f} GiB. "
        + f"Sizes that fit here: {', '.join(fitting) or 'none'}; for example "
        f"--config recipes/vit22b.py:{name} --config.model.remat=full --config.batch_size={batch}"
    )


def check_parameter_memory(abstract: ViT | list[ViT], field: str, value: object, dtype: str) -> None:
    """Raises `RecipeError` where parameters alone, of one or several models, exceed the memory of a device here.

    `dtype` is that of their matrices, for the message.
    """
    needed, available = sharding.bytes_per_device(abstract) / GIB, device_memory(jax.local_devices()[0]) / GIB
    remedy = f"parameters need {needed:.1f} GiB per device in {dtype}, there are {available:.1f}; use more devices"
    check(needed <= available, field, value, remedy)


def fitting_batch(recipe: Recipe, shape: tuple[int, int, int], available: int) -> int:
    """A batch size that should fit with full rematerialisation, 0 if none: an estimate on the safe side.

    Beside the state lie gradients and updates, and an eighth of all is left free. An image takes every layer's bf16
    input, and one layer's inner activations: about 40 values per token and width, as measured with ViT-L/16 on a GPU;
    twice that, for safety.
    """
    replica, data, model = shape
    config = recipe.model
    state = state_memory(recipe, shape)
    left = available - 1.125 * (sum(state.values()) + state["parameters"])
    per_image = 2 * 2 * config.num_tokens * config.width * (config.depth + 40) / model
    per_device = int(left / per_image)
    return min(2 ** (per_device.bit_length() - 1), 1024) * replica * data if per_device >= 1 else 0


def at_size(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the width, depth, MLP and heads of a rung of the ladder."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **size(name, LADDER)))


def step_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes per device of a compiled step: arguments, temporaries and outputs, donated buffers once.

    None on a platform that does not say.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs


def check_step_memory(recipe: Recipe, compiled: jax.stages.Compiled, mesh: Mesh, beside: int = 0) -> None:
    """Raises `RecipeError` where a compiled step's arguments and temporaries exceed a device's memory.

    `beside`: bytes per device that are in use for something else.
    """
    needed, analysis = step_bytes(compiled), compiled.memory_analysis()
    available = device_memory(jax.local_devices()[0]) - beside
    if needed is None or analysis is None or needed <= available:
        return
    temporaries = analysis.temp_size_in_bytes
    unit = mesh.shape["replica"] * mesh.shape["data"] * recipe.optim.accumulate_steps * 2
    # Gradients and updates stay, whatever the batch; the rest goes with it.
    fixed = min(2 * state_memory(recipe, tuple(mesh.shape.values()))["parameters"], temporaries)
    share = max(available - (needed - temporaries) - fixed, 0) / max(temporaries - fixed, 1)
    smaller = int(recipe.batch_size * share) // unit * unit
    remedies = [f"--config.batch_size={smaller}"] if smaller else []
    remedies += [f"more optim.accumulate_steps than {recipe.optim.accumulate_steps}"]
    remedies += ["--config.model.remat=full"] if recipe.model.remat != "full" else []
    raise RecipeError(
        f"batch_size={recipe.batch_size}: a step needs {needed / GIB:.1f} GiB per device "
        f"(state and batch {(needed - temporaries) / GIB:.1f}, temporaries {temporaries / GIB:.1f}), there are "
        f"{available / GIB:.1f}; try {' or '.join(remedies)}"
    )
