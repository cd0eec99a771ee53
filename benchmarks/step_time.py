"""Times a recipe's train step on the GPUs here: one line of JSON, as in benchmarks/h200_steps.jsonl.

    python benchmarks/step_time.py NAME --config recipes/vit22b.py:1B --config.batch_size=256 >> FILE

The step is compiled and sharded as in training; one batch of random images lies on the devices. Of 13 steps, each
waited for, the median, least and largest of the last ten are given.
"""

import datetime
import functools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import numpy as np

from launch.command_line import parse
from vit22b import sharding
from vit22b.config import RecipeError
from vit22b.flops import train_flops
from vit22b.hardware import GIB, peak_flops
from vit22b.step import abstract_batch, abstract_state, compile_train_step, init_state

WARM_UP, TIMED = 3, 10


def measure(name: str, arguments: list[str]) -> dict:
    recipe, _ = parse([sys.argv[0], *arguments])
    recipe.validate()
    devices = jax.devices()
    shape = sharding.mesh_shape(recipe.mesh, len(devices))
    sharding.check_divisibility(recipe, shape)
    mesh = sharding.make_mesh(shape, devices)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        compiled = compile_train_step(recipe, sharding.concrete(abstract_state(recipe), mesh))
        compile_s = time.perf_counter() - start
        state = jax.jit(functools.partial(init_state, recipe))()
        random = np.random.default_rng(0)
        limits = {"image": 256, "label": recipe.model.num_classes}
        batch = {
            key: jax.device_put(random.integers(0, limits[key], leaf.shape, dtype=leaf.dtype), leaf.sharding)
            for key, leaf in sharding.concrete(abstract_batch(recipe), mesh).items()
        }
        seconds = []
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[WARM_UP:])
    step_s = timed[len(timed) // 2]
    memory, peak = compiled.memory_analysis(), peak_flops(devices[0])
    assert memory is not None
    flops = train_flops(recipe.model) * recipe.batch_size
    return {
        "name": name,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "args": arguments,
        "jax": jax.__version__,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": shape,
        "batch_size": recipe.batch_size,
        "step_s": round(step_s, 5),
        "min_s": round(timed[0], 5),
        "max_s": round(timed[-1], 5),
        "images_per_second": round(recipe.batch_size / step_s, 1),
        "mfu": None if peak is None else round(flops / step_s / len(devices) / peak, 4),
        "compile_s": round(compile_s, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "peak_gib": round((devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB, 3),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
    except (RecipeError, IndexError) as error:
        sys.exit(f"error: {error}" if isinstance(error, RecipeError) else __doc__)
