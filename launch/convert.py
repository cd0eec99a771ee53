"""Public weights into a work directory of ours, and a run's model into files of timm, transformers or StableHLO.

    python launch/convert.py --from hf:facebook/dinov2-base --to runs/dinov2-b
    python launch/convert.py --from runs/mine --to timm:mine.safetensors

--from: a work directory, of a run of several students one of them as RUN@NAME; hf:FOLDER_OR_ID, as transformers'
        save_pretrained writes it or the hub has it; timm:FILE, FOLDER or ID; npz:FILE, as big_vision publishes. Of
        files in several shards only what a device needs is read.
--to:   a work directory, which recipe.json and a checkpoint make; hf:FOLDER; timm:FILE.safetensors, with a .json of
        the class's arguments beside it (distill/layouts/timm.py says how timm builds the model); npz:FILE, as
        big_vision reads it; stablehlo:FILE, with FILE.safetensors. Nothing is overwritten.

What config.json and the tensors do not tell, such as the number of heads of a bare file of timm's, is asked for:
--config.model.num_heads=12. The same way any field of the model, and data.mean, data.std, data.eval_crop_fraction and
data.eval_resize, can be set. Read are ViT, DeiT III, DINOv2 with and without registers, DINOv3, SigLIP and SigLIP 2
(fixed sizes and NaFlex), InternViT and EVA-02, whichever of their layouts fits; --layout NAME says which.

The model is spread over all devices here. Parameters are kept in fp32.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from distill import convert, stablehlo, weights
from launch.command_line import flag_parser
from vit22b import frozen, sharding
from vit22b.config import DataConfig, MeshConfig
from vit22b.errors import RecipeError, check
from vit22b.memory import check_parameter_memory
from vit22b.model import ViT, abstract_model
from vit22b.model_config import ModelConfig

FIELDS = {"model": ModelConfig, "data": DataConfig}
NEEDED = {int: "an integer", bool: "true or false", float: "a number"}


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The flags, and the overrides of `--config.SECTION.FIELD=VALUE` by section; raises `RecipeError`."""
    parser = flag_parser(__doc__)
    parser.add_argument("--from", dest="source", metavar="WHAT")
    parser.add_argument("--to", dest="target", metavar="WHAT")
    parser.add_argument("--layout", metavar="NAME")
    try:
        arguments, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(str(error)) from error
    for flag, value in (("--from", arguments.source), ("--to", arguments.target)):
        if not value:
            raise RecipeError(f"{flag}: give it, as in --from hf:facebook/dinov2-base --to runs/dinov2-b")
    library, _, name = arguments.target.partition(":")
    known = library in (*weights.LIBRARIES, "stablehlo")
    check(bool(name) or not known, "--to", arguments.target, f"needs a name, as {library}:mine")
    if library in weights.LIBRARIES:
        convert.check_suffix(library, Path(name))
    overrides: dict[str, dict[str, Any]] = {section: {} for section in FIELDS}
    for word in rest:
        section, field, text = split_override(word)
        overrides[section][field] = typed(section, field, text)
    return arguments, overrides


def split_override(word: str) -> tuple[str, str, str]:
    """'--config.model.depth=2' as its three parts."""
    name, equals, text = word.partition("=")
    section, _, field = name.removeprefix("--config.").partition(".")
    known = {"model": [f.name for f in dataclasses.fields(ModelConfig)], "data": list(weights.PREPROCESSING)}
    if not name.startswith("--config.") or not equals or field not in known.get(section, []):
        fields = ", ".join(f"data.{each}" for each in weights.PREPROCESSING)
        raise RecipeError(f"{word}: not a flag; fields are those of the model and {fields}, as --config.model.depth=2")
    return section, field, text


def typed(section: str, field: str, text: str) -> Any:
    """The value of a field from the command line."""
    kind = next(f.type for f in dataclasses.fields(FIELDS[section]) if f.name == field)
    if kind is str:
        return text
    try:
        value = json.loads(text.replace("(", "[").replace(")", "]"))
    except ValueError:
        value = None
    if kind is float and isinstance(value, int | float):
        return float(value)
    if kind in (int, bool) and type(value) is kind:
        return value
    if isinstance(value, list) and kind not in (int, bool, float):
        return tuple(map(float, value))
    needed = next((needed for each, needed in NEEDED.items() if kind is each), "numbers, as '(0.5,0.5,0.5)'")
    raise RecipeError(f"--config.{section}.{field}={text}: needs {needed}")


def run(argv: list[str]) -> None:
    """Converts; raises `RecipeError` for what the user can mend."""
    arguments, overrides = parse(argv)
    devices = jax.devices()
    with jax.set_mesh(sharding.make_mesh(sharding.mesh_shape(MeshConfig(), len(devices)), devices)):
        model, data = read(arguments, overrides)
        write(model, data, arguments)


def read(arguments: argparse.Namespace, overrides: dict[str, dict[str, Any]]) -> tuple[ViT, dict[str, Any]]:
    """The model on the mesh in force, and the fields of its preprocessing."""
    source = arguments.source
    if source.split(":")[0] not in weights.LIBRARIES:
        if overrides["model"]:
            raise RecipeError(f"--config.model.{next(iter(overrides['model']))}: a work directory tells its own")
        model, recipe = convert.load_workdir(source)
        print(f"{source}: {describe(model)}")
        folder, member = frozen.run_and_member(source)
        more = ", ".join(f"{source}@{each}" for each in frozen.members(folder)[1:])
        if more and not member:
            print(f"{source}: is that run's first model; there are more: {more}")
        return model, {name: getattr(recipe.data, name) for name in weights.PREPROCESSING} | overrides["data"]
    opened = weights.open_source(source, arguments.layout, overrides["model"])
    data = opened.preprocessing | overrides["data"]
    for name, example in weights.ASKED.items():
        if name not in data:
            raise RecipeError(f"data.{name}: no file tells it; give it, as in --config.data.{name}='{example}'")
    check_parameter_memory(abstract_model(opened.config), "model.width", opened.config.width, "fp32")
    model = convert.load(opened)
    print(f"{source}: read as {opened.layout.name}, {describe(model)}")
    return model, data


def describe(model: ViT) -> str:
    config, count = model.config, sum(leaf.size for leaf in jax.tree.leaves(model))
    shape = f"width {config.width}, depth {config.depth}, {config.image_size} px in patches of {config.patch_size}"
    return f"{count / 1e6:,.1f} M parameters, {shape}"


def write(model: ViT, data: dict[str, Any], arguments: argparse.Namespace) -> None:
    library, _, name = arguments.target.partition(":")
    if library == "stablehlo":
        stablehlo.export(model, Path(name))
        print(f"{arguments.target}: written, with {name}.safetensors")
    elif library in weights.LIBRARIES:
        layout = arguments.layout if arguments.source.split(":")[0] not in weights.LIBRARIES else None
        print(f"{arguments.target}: written as {convert.save(model, library, Path(name), data, layout).name}")
    else:
        folder = Path(arguments.target)
        convert.save_workdir(model, folder, folder.name, data, arguments.source)
        print(f"{folder}: written")


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    try:
        run(sys.argv[1:])
        return 0
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
