"""Probes a frozen encoder: how well its features classify, by linear heads, neighbours and few examples.

    python launch/probe.py --model runs/mine --train tfds:imagenet2012 --val tfds:imagenet2012:validation
    python launch/probe.py --model hf:facebook/dinov2-base --train folder:/data/birds --val folder:/data/birds:test

--model: a work directory, of a run of several students one of them as RUN@NAME; weights of other libraries as
launch/convert.py reads them; or random:RECIPE.py[:ARGUMENT], an untrained model, which others can be compared with.
How its images are made, --mean, --std, --eval_crop_fraction and --eval_resize, follows from it; what no file tells, as
of an npz file, is asked for. Features are extracted once, by all devices here, and kept in the work directory; the same
command again goes on where it was stopped. Settings are chosen on a part of the training set that is held out, then
trained again on all of it, and reported on --val.

--protocol: sweep (features stored; minutes), logistic (scikit-learn's logistic regression of stored features), or
vit22b, dinov2, dinov3 (SGD on new crops in each epoch). Each sets defaults that other flags override; --FLAG=VALUE sets
any field of vit22b/probing/config.py, several values as --learning_rates=0.1,1. vit22b/probing/features.py says which
--features there are.

--also NAME=SOURCE[,labels=FILE|,classes=FILE], as often as wanted, reports the winner on further sets: with several
right labels for each image, or with classes mapped to those of the training set (vit22b/probing/scoring.py says how).
--decompose true says what the error comes from.

The work directory gets results.json, report.html and a table on the terminal. Exit status: 0; 2, a mistake.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of a GPU, as in launch/tpu.py

import jax

from distill import convert, weights
from launch.command_line import writable_folder
from launch.tpu import join_cluster, keep_compiled_programs
from vit22b import frozen, sharding
from vit22b.config import DataConfig, MeshConfig
from vit22b.errors import RecipeError, check
from vit22b.frozen import frozen_config, placed
from vit22b.memory import check_parameter_memory
from vit22b.model import ViT, abstract_model
from vit22b.probing.config import ProbeConfig, protocol_fields, typed
from vit22b.probing.encoder import encoder_of
from vit22b.probing.run import note, probe


def parse(argv: list[str]) -> ProbeConfig:
    """The flags, those not given as the protocol has them; raises `RecipeError`."""
    fields = [field.name for field in dataclasses.fields(ProbeConfig)]
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in fields:
            raise RecipeError(f"{word}: not a flag; flags are --{', --'.join(fields)}")
        if not equals:
            following = next(words, None)
            if following is None:
                raise RecipeError(f"--{name}: needs a value")
            text = following
        # What other flags take after a comma, a set's own description has there.
        given[name] = (*given.get(name, ()), text) if name == "also" else typed(name, text)
    required = dict.fromkeys(("model", "train", "val"), "")
    batch_size = ProbeConfig(**required | given).batch_size
    config = ProbeConfig(**required | protocol_fields(given.get("protocol", "sweep"), batch_size) | given)
    config.validate()
    return config


def run(config: ProbeConfig) -> None:
    """Raises `RecipeError` for what the user can mend."""
    devices = jax.devices()
    count = len(devices)
    for name in ("batch_size", "extract_batch_size"):
        size = getattr(config, name)
        check(size % count == 0, f"--{name}", size, f"must be a multiple of the {count} devices")
    keep_compiled_programs(devices[0].platform)
    shape = sharding.mesh_shape(MeshConfig(), count)
    name = Path(config.model.partition(":")[2] or config.model).name
    workdir = writable_folder(config.workdir or f"runs/probe-{name}")
    with jax.set_mesh(sharding.make_mesh(shape, devices)):
        given = {name: getattr(config, name) for name in weights.PREPROCESSING if getattr(config, name)}
        model, data = load(config.model, config.dtype, given)
        note(f"{config.model}: width {model.config.width}, depth {model.config.depth}; results go to {workdir}")
        probe(encoder_of(model, data, config), config, workdir)


def load(name: str, matmul: str, given: dict[str, Any]) -> tuple[ViT, DataConfig]:
    """A model to be used as it is, on the mesh in force, and how its images are made. Raises `RecipeError`.

    `given` are fields of `DataConfig` that win over what the model's recipe or files say.
    """
    if name.split(":")[0] in weights.LIBRARIES:
        source = weights.open_source(name)
        source = dataclasses.replace(source, config=frozen_config(source.config, matmul))
        data = source.preprocessing | given
        missing = [f"--{each}={example.strip('()')}" for each, example in weights.ASKED.items() if each not in data]
        check(not missing, "--model", name, f"no file tells how images are made; give it, as in {' '.join(missing)}")
        abstract = abstract_model(source.config)
        check_parameter_memory(abstract, "--model", name, "fp32")
        model = jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), convert.load(source), placed(abstract))
        return model, DataConfig(train="", validation="", **data)
    recipe = frozen.recipe_of("--model", name)
    config = frozen_config(recipe.model, matmul)
    abstract = placed(abstract_model(config))
    check_parameter_memory(abstract, "--model", name, matmul)
    return frozen.load("--model", name, abstract, seed=0), dataclasses.replace(recipe.data, **given)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    try:
        config = parse(sys.argv[1:])
        join_cluster()
        run(config)
        return 0
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
