"""Times the training of a grid of linear heads by SGD, as launch/probe.py trains them on stored features.

    python benchmarks/probe_speed.py [--rows 1280000] [--width 1024] [--classes 1000] [--heads 48] [--epochs 10]
        [--batch 1024] [--json FILE]

Features are random, in bf16, and lie in the host's memory (those of a probe: in files); labels are random. Runs on all
devices of this process, and prints one line of JSON, which --json appends to a file:

    train_s             of the whole training, in which the host reads batches ahead, without compiling
    first_s             of a single step before that: compiling
    rows_per_second     each row counts once per epoch, however many heads there are
    tflops_per_second   of the two matmuls of a step, for logits and for the kernels' gradient, 4 FLOPs for each row,
                        feature and class of a head (frozen features need no gradient)
    train_loss          the best head's, on the first 10,000 rows: below log(classes), as even random labels are learned

Exit status: 0; 2, a mistake.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # as in launch/probe.py

import jax
import jax.numpy as jnp
import numpy as np

from launch.command_line import flag_parser
from vit22b import sharding
from vit22b.config import MeshConfig
from vit22b.errors import RecipeError, check
from vit22b.probing import heads, sgd
from vit22b.probing.config import ProbeConfig
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features

MEASURED = 10_000  # rows


def random_features(rows: int, width: int, classes: int) -> Features:
    """Made by a device, which is faster at that."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16))
    return Features({"x": x}, np.random.default_rng(0).integers(classes, size=rows, dtype=np.int32), classes)


def measure(features: Features, config: ProbeConfig) -> dict[str, object]:
    """Figures under the names above, but for those of the devices; on the mesh in force."""
    rows, width, grid = len(features), features.columns["x"].shape[1], sgd.grid(config)

    def train(steps: int | None) -> tuple[Heads, float]:
        """At most so many steps, and their seconds."""
        start = time.perf_counter()
        stream = itertools.islice(sgd.stored_batches(features, np.arange(rows), ["x"], config), steps)
        (group,) = sgd.train(grid, stream, {"x": width}, features.num_classes, rows, config)
        jax.block_until_ready(group.kernel)
        return group, time.perf_counter() - start

    _, first_s = train(1)
    group, train_s = train(None)
    seen = sgd.num_steps(config.epochs[0], rows, config.batch_size) * config.batch_size
    measured = heads.measure(group, features, np.arange(min(rows, MEASURED)))
    return {
        "rows": rows,
        "width": width,
        "classes": features.num_classes,
        "heads": len(grid),
        "epochs": config.epochs[0],
        "batch": config.batch_size,
        "train_s": train_s,
        "first_s": first_s,
        "rows_per_second": seen / train_s,
        "tflops_per_second": 4 * seen * width * features.num_classes * len(grid) / train_s / 1e12,
        "train_loss": min(sums.result()["loss"] for sums in measured),
    }


def main() -> int:
    parser = flag_parser(__doc__)
    defaults = {"rows": 1_280_000, "width": 1024, "classes": 1000, "heads": 48, "epochs": 10, "batch": 1024}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    devices = jax.devices()
    try:
        arguments = parser.parse_args()
        for name in defaults:
            value = getattr(arguments, name)
            check(value >= 1, f"--{name}", value, "must be at least 1")
        check(
            arguments.batch % len(devices) == 0,
            "--batch",
            arguments.batch,
            f"must be a multiple of {len(devices)} devices",
        )
    except (RecipeError, argparse.ArgumentError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    config = ProbeConfig(
        model="random",
        train="random",
        val="random",
        features=("x",),
        learning_rates=tuple(np.geomspace(0.01, 1.0, arguments.heads).tolist()),
        weight_decays=(1e-5,),
        epochs=(arguments.epochs,),
        batch_size=arguments.batch,
    )
    with jax.set_mesh(sharding.make_mesh(sharding.mesh_shape(MeshConfig(), len(devices)), devices)):
        found = measure(random_features(arguments.rows, arguments.width, arguments.classes), config)
    found |= {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__}
    line = json.dumps(found)
    print(line)
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
