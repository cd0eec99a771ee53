"""Where converted models are written, which model of a run is meant, and what a description may lack."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from conftest import MeshFactory
from teachers import recipe
from test_convert import EXPRESSIBLE, assert_same, config_of, random_model, written

from distill import convert, weights
from distill.layouts import LAYOUTS
from launch import convert as program
from vit22b import frozen, step
from vit22b.checkpoint import Checkpoints
from vit22b.errors import RecipeError
from vit22b.frozen import frozen_config, placed
from vit22b.model import abstract_model
from vit22b.model_config import ALL_SIZES
from vit22b.workdir import open_workdir


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("timm:mine.json", "--to=timm:mine.json: needs a file's name with .safetensors, as timm:mine.safetensors"),
        ("timm:mine", "--to=timm:mine: needs a file's name with .safetensors"),
        ("npz:mine.safetensors", "--to=npz:mine.safetensors: needs a file's name with .npz"),
        ("timm:", "--to=timm:: needs a name, as timm:mine"),
        ("stablehlo:", "--to=stablehlo:: needs a name"),
    ],
)
def test_a_name_that_could_not_be_read_back_is_refused(
    target: str, message: str, mesh: MeshFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with mesh():
        fields = {**EXPRESSIBLE["npz-big-vision"][0], "num_classes": 1}
        convert.save_workdir(random_model(config_of(fields)), Path("work"), "work", {}, "here")
    with pytest.raises(RecipeError) as caught:
        program.run(["--from", "work", "--to", target])
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_each_model_of_a_run_of_several_is_named(
    mesh: MeshFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(ALL_SIZES, "0.5M", (16, 1, 32, 2))
    given = recipe(["runs/teacher"], more_students=("0.5M",))
    run = tmp_path / "run"
    with mesh():
        state = jax.jit(lambda: step.init_state(given))()
        open_workdir(run, given, {})
        checkpoints = Checkpoints(run / "checkpoints", given)
        checkpoints.save(1, state)
        checkpoints.wait()
        trained = state.eval_model.models
        for name, model in (("", trained["student"]), ("@student", trained["student"]), ("@0.5M", trained["0.5M"])):
            found, of_run = convert.load_workdir(f"{run}{name}")
            assert_same(found, model)
            assert of_run.model == found.config
            assert of_run.model == given.students()[name.removeprefix("@") or "student"]
            config = frozen_config(of_run.model, "fp32")  # as teachers and probed encoders are
            assert_same(frozen.load("--model", f"{run}{name}", placed(abstract_model(config)), seed=0), model)
    with pytest.raises(RecipeError, match=r"--from=.*run@1B: the models of .*run are student, 0\.5M"):
        convert.load_workdir(f"{run}@1B")
    program.run(["--from", str(run), "--to", str(tmp_path / "first")])
    assert f"there are more: {run}@0.5M" in capsys.readouterr().out
    program.run(["--from", f"{run}@0.5M", "--to", str(tmp_path / "second")])
    with mesh():
        assert convert.load_workdir(str(tmp_path / "second"))[1].model.depth == 1


@pytest.mark.parametrize("key", ["qkv_bias", "num_attention_heads", "layerscale_value"])
def test_what_a_description_lacks_can_be_given(key: str, mesh: MeshFactory, tmp_path: Path) -> None:
    with mesh():
        model, spec = written("hf-dinov2", EXPRESSIBLE["hf-dinov2"][0], tmp_path)
        path = Path(spec.removeprefix("hf:")) / "config.json"
        described = json.loads(path.read_text())
        del described[key]
        field = weights.FIELDS[key]
        source = weights.open_source(spec)
        # As weights that others wrote, which do not have our own configuration beside them.
        theirs = weights.Published(described, {name: x.shape for name, x in source.arrays.items()})
        with pytest.raises(RecipeError, match=f"have '{key}'; give --config.model.{field}="):
            weights.configuration(LAYOUTS["hf-dinov2"], theirs, {}, {})
        given = {field: getattr(model.config, field)}
        found = weights.configuration(LAYOUTS["hf-dinov2"], theirs, {}, given)
        assert found == dataclasses.replace(model.config, matmul=found.matmul)
