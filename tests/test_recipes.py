"""Every recipe in recipes/, with each of its arguments: valid, traceable at full size, and saying what it is."""

import dataclasses
import functools
import importlib
import inspect
import math
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest
from jax.sharding import use_abstract_mesh

from launch.command_line import parse
from vit22b import config, model_config
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check_choice
from vit22b.model import REMAT
from vit22b.model_config import LADDER, ModelConfig
from vit22b.optim import schedule
from vit22b.sharding import abstract_mesh, check_divisibility, mesh_shape, spec_of
from vit22b.step import abstract_state, train_step

FILES = sorted(Path(__file__).parent.parent.glob("recipes/*.py"))
NO_SUCH_ARGUMENT = "no such argument"


def module(file: Path) -> ModuleType:
    return importlib.import_module(f"recipes.{file.stem}")


def arguments(file: Path) -> list[str]:
    """What may follow FILE: on the command line, as the error about anything else lists it."""
    get_config = module(file).get_config
    if not inspect.signature(get_config).parameters:
        return [""]
    with pytest.raises(RecipeError, match=f"='{NO_SUCH_ARGUMENT}': choose one of ") as error:
        get_config(NO_SUCH_ARGUMENT)
    return str(error.value).partition("choose one of ")[2].split(", ")


def get(file: Path, argument: str) -> Recipe:
    return module(file).get_config(*([argument] if argument else []))


RECIPES = {
    file.stem + (argument and f":{argument}"): get(file, argument) for file in FILES for argument in arguments(file)
}
DEBUG = {name: recipe for name, recipe in RECIPES.items() if name.startswith("debug")}
# The 22B recipe on the chips of its paper, all others on 8 devices.
SHAPES = {name: (16, 16, 4) if name == "vit22b:22B" else mesh_shape(recipe.mesh, 8) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstrings_hold_source_command_and_result(file: Path) -> None:
    text = module(file).__doc__ or ""
    assert re.search(r"^Source: ", text, re.MULTILINE)
    command = re.search(r"^Command: .*python launch/tpu.py --config (\S+)", text, re.MULTILINE)
    assert command is not None
    path, _, argument = command[1].partition(":")
    assert path == f"recipes/{file.name}"
    recipe, _ = parse(["launch/tpu.py", f"--config={file}{argument and ':' + argument}"])
    assert recipe == get(file, argument)
    not_run, measured = (re.search(rf"^{word}", text, re.MULTILINE) for word in (r"Not run\.", r"Measured: .*\d"))
    assert (not_run is None) != (measured is None), "either 'Not run.' or 'Measured: ' and what"


def described(tree) -> dict[str, tuple]:
    """Shape, dtype and partition of each leaf by its path; a partition without the None at its end."""

    def partition(leaf) -> tuple:
        spec = tuple(spec_of(leaf))
        return spec[: max((i + 1 for i, axis in enumerate(spec) if axis is not None), default=0)]

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), partition(leaf)) for path, leaf in leaves}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_returns_the_state_as_it_got_it(name: str) -> None:
    recipe, shape = RECIPES[name], SHAPES[name]
    recipe.validate()
    check_divisibility(recipe, shape)
    assert shape == mesh_shape(recipe.mesh, math.prod(shape))

    with use_abstract_mesh(abstract_mesh(shape)):
        state = abstract_state(recipe)
        stepped, metrics = jax.eval_shape(functools.partial(train_step, recipe), state, recipe.objective().batch())
    assert described(stepped) == described(state)
    assert set(described(metrics).values()) == {((), "float32", ())}


def parameters(name: str) -> int:
    with use_abstract_mesh(abstract_mesh((1, 1, 1))):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_state(RECIPES[name]).model))


def test_parameter_counts_are_the_sources() -> None:
    # DeiT-S has 22,050,664 parameters, of them 384 x (1 + 197) of class token and positions, which this S/16 lacks.
    assert parameters("vit_s16_i1k:90") == 22_050_664 - 384 * 198
    # README_revenge.md of facebookresearch/deit: 86.6 M and 304.4 M.
    assert parameters("vit_b16_i1k:800") == pytest.approx(86.6e6, abs=0.05e6)
    assert parameters("vit_l16:800") == pytest.approx(304.4e6, abs=0.05e6)
    # [Zhai 2022] Table 2: 1,843 M, without attention pooling and the classifier of 29,593 classes.
    pooling = 4 * 1664**2 + 2 * 1664 * 8192
    assert parameters("vit_g14:G") - pooling - 1664 * 29_593 == pytest.approx(1843e6, rel=1e-3)
    # [Dehghani 2023] Table 1: 21,743 M, which are the blocks' matrices alone: 48 x (4 x 6144^2 + 2 x 6144 x 24576).
    matrices, embeddings = 21_743_271_936, (3 * 14**2 + 16**2 + 1) * 6144
    vectors = 48 * (6144 + 2 * 128 + 24_576 + 6144) + 6144  # norm, query and key norms, the MLP's biases; final norm
    pooling = 4 * 6144**2 + 2 * 6144 * 24_576 + 2 * 6144 + 24_576 + 6144  # matrices, probe and norm, the MLP's biases
    assert parameters("vit22b:22B") == matrices + embeddings + vectors + pooling + 6145 * 29_593


def test_vit22b_has_every_rung_and_a_wrong_one_is_told_in_one_line() -> None:
    assert [name.partition(":")[2] for name in RECIPES if name.startswith("vit22b")] == list(LADDER)
    with pytest.raises(RecipeError) as error:
        parse(["launch/tpu.py", f"--config={FILES[0].parent}/vit22b.py:23B"])
    assert str(error.value) == f"size='23B': choose one of {', '.join(LADDER)}"


def test_vit22bs_learning_rate_is_the_papers() -> None:
    recipe = RECIPES["vit22b:22B"]
    rate = schedule(recipe.optim, recipe.total_steps)
    for step, expected in {
        0: 1e-7,  # 1e-3 / 10,000
        4_999: 5e-4,
        9_999: 1e-3,  # the warm-up's last step
        10_000: 1e-3,
        40_000: 5e-4,  # 1e-3 / sqrt(1 + 3)
        100_000: 3.162278e-4,  # 1e-3 / sqrt(10)
        147_000: 2.608203e-4,  # 1e-3 / sqrt(14.7); the cooldown's first step
        162_000: 1.242260e-4,  # 1e-3 / sqrt(16.2) / 2
        176_999: 7.923062e-9,  # 1e-3 / sqrt(17.6999) / 30,000
    }.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5), step


def test_epochs_become_steps() -> None:
    steps = {name: recipe.total_steps for name, recipe in RECIPES.items()}
    assert steps["vit_s16_i1k:90"] == 112_603  # 112,603 x 1,024 = 90 x 1,281,167 + 442
    assert steps["vit_s16_i1k:300"] == 375_342
    assert steps["vit_b16_i1k:400"] == steps["vit_l16:400"] == 250_228  # of 2,048
    assert steps["vit_b16_i1k:800"] == 500_456


# Values that no debug recipe takes, and why.
NOT_IN_DEBUG = {
    "model.attention": {"cudnn", "pallas"},  # need a GPU
}
NO_MECHANISM = {
    "name",
    "seed",
    "data.train",  # each kind of source has its tests in test_data.py
    "data.validation",
    "mesh.replica",  # 1, so that a debug recipe runs on any number of devices
    "mesh.model",
}


def choices(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The choices of each field, as the checks know them."""
    found = {"model.remat": set(REMAT)}

    def record(field: str, value: str, choices: tuple[str, ...]) -> None:
        found[field] = set(choices)
        check_choice(field, value, choices)

    for checking in (config, model_config):
        monkeypatch.setattr(checking, "check_choice", record)
    for recipe in DEBUG.values():
        recipe.validate()
    return found


def defaults() -> dict[str, object]:
    """The fields that have a default, by their dotted names, with it."""
    parts = {"": Recipe, "model.": ModelConfig, "loss.": config.LossConfig, "optim.": config.OptimConfig,
             "data.": config.DataConfig, "mesh.": config.MeshConfig, "run.": config.RunConfig}  # fmt: skip
    fields = [(prefix + field.name, field) for prefix, part in parts.items() for field in dataclasses.fields(part)]
    return {name: field.default for name, field in fields if field.default is not dataclasses.MISSING}


def test_the_debug_recipes_together_take_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = [recipe.flat() for recipe in DEBUG.values()]
    taken = {name: {str(recipe[name]) for recipe in flat} for name in flat[0]}
    known = choices(monkeypatch)
    for name, value in flat[0].items():
        if isinstance(value, str) and name not in NO_MECHANISM:
            assert taken[name] == known[name] - NOT_IN_DEBUG.get(name, set()), name
    for name, value in defaults().items():
        if isinstance(value, bool):
            assert taken[name] == {"True", "False"}, name
        elif value in (0, 1) and name not in NO_MECHANISM:  # such a default is off, or once
            assert taken[name] - {str(value)}, name


@pytest.mark.parametrize("name", DEBUG)
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_the_debug_recipes_fit_any_number_of_devices(name: str, num_devices: int) -> None:
    assert DEBUG[name].model.width == 64
    check_divisibility(DEBUG[name], mesh_shape(DEBUG[name].mesh, num_devices))
