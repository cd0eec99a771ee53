"""A run as a whole: the same result on any mesh, after any interruption, and the files it leaves."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.tpu import run
from vit22b import data, step
from vit22b.checkpoint import Checkpoints
from vit22b.config import DataConfig, MeshConfig, OptimConfig, Recipe, RunConfig
from vit22b.errors import RecipeError
from vit22b.metrics import classification_sums
from vit22b.mix import normalize
from vit22b.model_config import ModelConfig
from vit22b.names import named_leaves
from vit22b.report import Reporter, read_metrics
from vit22b.sharding import concrete, make_mesh
from vit22b.train import evaluate
from vit22b.workdir import is_resumable, open_workdir, version

DEVICES = jax.devices()


def tiny(**changes) -> Recipe:
    """Six steps on the digits, everything random switched on; 9 batches of 40 hold the 360 validation images."""
    recipe = Recipe(
        name="tiny",
        total_steps=6,
        batch_size=48,
        model=ModelConfig(
            width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=10, image_size=8, patch_size=4, matmul="fp32",
            stochastic_depth=0.2,
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, ema_decay=0.9),
        data=DataConfig(
            train="digits", validation="digits", crop="inception", augment="randaugment", random_erasing=0.5,
            mixup=0.5, cutmix=0.5, eval_crop_fraction=1.0, threads=1,
        ),
        run=RunConfig(log_every_steps=1, eval_every_steps=3, checkpoint_every_steps=3),
    )  # fmt: skip
    return dataclasses.replace(recipe, **changes)


def final_state(workdir: Path, recipe: Recipe, shape=(1, 1, 1)) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, restored onto a mesh of `shape`."""
    with jax.set_mesh(make_mesh(shape, DEVICES[: int(np.prod(shape))])) as _:
        mesh = jax.sharding.get_mesh()
        state = Checkpoints(workdir / "checkpoints", recipe).restore(concrete(step.abstract_state(recipe), mesh))
        return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The work directory of an uninterrupted run on eight devices, FSDP x tensor parallel x replicas."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(tiny(mesh=MeshConfig(replica=2, data=2, model=2)), workdir) == 0
    return workdir


@pytest.mark.parametrize("name", ["replica", "data", "model"])
def test_training_on_eight_devices_equals_one_along_every_axis(mesh, name):
    recipe = tiny(optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0))
    shape = {"replica": 1, "data": 1, "model": 1} | ({"model": 4, "data": 2} if name == "model" else {name: 8})
    source, _ = data.open_sources(recipe)
    ends = []
    for counts in ({}, shape):
        with mesh(**counts) as m:
            state = jax.jit(lambda: step.init_state(recipe))()
            train_fn = step.compile_train_step(recipe, concrete(step.abstract_state(recipe), m))
            losses = []
            for batch, _ in zip(data.train_batches(source, recipe, 0, 0, 1), range(3), strict=False):
                placed = jax.device_put(batch, jax.NamedSharding(m, jax.P(("replica", "data"))))
                state, metrics = train_fn(state, placed)
                losses.append(float(metrics["loss"]))
            ends.append((losses, {k: np.asarray(v) for k, v in named_leaves(state.model).items()}))
    (one_losses, one), (eight_losses, eight) = ends
    np.testing.assert_allclose(eight_losses, one_losses, atol=1e-5)
    for key in one:
        np.testing.assert_allclose(eight[key], one[key], atol=1e-5, err_msg=key)


def test_a_run_stopped_by_a_signal_and_resumed_equals_an_uninterrupted_one_bitwise(finished, tmp_path, monkeypatch):
    recipe = tiny(mesh=MeshConfig(replica=2, data=2, model=2))
    preempted = Checkpoints.preempted

    def signalled_at_four(self, at):  # between two planned checkpoints
        if at == 4:
            signal.raise_signal(signal.SIGTERM)
        return preempted(self, at)

    monkeypatch.setattr(Checkpoints, "preempted", signalled_at_four)
    assert run(recipe, tmp_path) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints", recipe).latest_step == 4
    monkeypatch.undo()
    assert run(recipe, tmp_path) == 0
    resumed, whole = final_state(tmp_path, recipe), final_state(finished, recipe)
    assert resumed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    for name, series in read_metrics(finished).items():
        if name not in ("train/images_per_second", "train/data_wait"):
            assert read_metrics(tmp_path)[name] == series, name


def test_a_checkpoint_restores_bitwise_onto_other_meshes(finished):
    recipe = tiny(mesh=MeshConfig(replica=2, data=2, model=2))
    saved = final_state(finished, recipe, (2, 2, 2))
    for shape in ((1, 1, 1), (1, 8, 1), (1, 2, 4)):
        for name, array in final_state(finished, recipe, shape).items():
            np.testing.assert_array_equal(array, saved[name], err_msg=f"{name} on {shape}")


def test_checkpoints_name_their_arrays_by_path_and_hold_the_data_position(finished):
    folder = finished / "checkpoints" / "6"
    metadata = json.loads((folder / "state" / "_METADATA").read_text())["tree_metadata"]
    keys = {entry["key_metadata"][0]["key"] for entry in metadata.values()}
    assert {"step", "model/blocks/attention/query", "ema/head_kernel", "model/map_head/probe"} <= keys
    position = json.loads(next((folder / "data").glob("*")).read_text())
    assert position == {"next_example": 6 * 48, "seed": 0}


def test_a_package_that_is_not_installed_has_no_version() -> None:
    """A run that reads no TFDS need not have it."""
    assert version("jax") == jax.__version__
    assert version("no-such-package-of-anybody") is None


def test_the_work_directory_holds_what_the_run_was_and_did(finished):
    content = json.loads((finished / "recipe.json").read_text())
    assert content["recipe"]["model.width"] == 32
    assert content["recipe"]["mesh.model"] == 2
    (start,) = content["starts"]
    assert start["versions"]["jax"] == jax.__version__
    assert start["devices"] == "8 x cpu"
    assert {"commit", "modified", "command", "time"} <= start.keys()
    series = read_metrics(finished)
    assert list(series["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(series["validation/top1"]) == [3, 6]
    assert set(series["validation/examples"].values()) == {360}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [3, 6]
    assert "step       6/6" in (finished / "train.log").read_text()


def test_a_complete_run_says_so_and_changes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(tiny(mesh=MeshConfig(replica=2, data=2, model=2)), finished) == 0
    assert "complete after 6 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_work_directory_of_another_run_or_of_other_things_is_refused(finished, tmp_path):
    with pytest.raises(RecipeError, match=r"holds another run, with optim\.learning_rate=0\.001, not 0\.002"):
        run(tiny(optim=dataclasses.replace(tiny().optim, learning_rate=2e-3)), finished)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecipeError, match=r"holds files but no recipe\.json"):
        run(tiny(), tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"recipe\.json is not a run's"):
        run(tiny(), tmp_path)


def test_a_start_refused_for_its_memory_does_not_bind_the_work_directory(tmp_path):
    fingerprints = {"train": "a", "validation": "b"}
    open_workdir(tmp_path / "run", tiny(batch_size=96), fingerprints)
    (tmp_path / "run" / "metrics.jsonl").touch()
    open_workdir(tmp_path / "run", tiny(), fingerprints)
    content = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert content["recipe"]["batch_size"] == 48
    assert len(content["starts"]) == 2


def test_half_a_line_in_the_metrics_is_passed_over(finished, tmp_path):
    torn = (finished / "metrics.jsonl").read_text() + '{"step": 7, "ti'
    (tmp_path / "metrics.jsonl").write_text(torn)
    Reporter(tiny(), tmp_path).evaluation(8, {"top1": 0.5, "examples": 1})
    series = read_metrics(tmp_path)["validation/top1"]
    assert series == read_metrics(finished)["validation/top1"] | {8: 0.5}


def test_a_damaged_checkpoint_is_named_with_the_way_out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "6"
    shutil.rmtree(folder / "state")
    recipe = tiny(mesh=MeshConfig(replica=2, data=2, model=2))
    with pytest.raises(RecipeError, match=r"checkpoints/6: cannot be restored .* remove that folder"):
        final_state(tmp_path / "run", recipe)
    shutil.rmtree(folder)
    assert int(final_state(tmp_path / "run", recipe)["step"]) == 3


def test_a_missing_last_evaluation_is_made_up_for(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert run(tiny(mesh=MeshConfig(replica=2, data=2, model=2)), tmp_path / "run") == 0
    assert read_metrics(tmp_path / "run")["validation/loss"] == read_metrics(finished)["validation/loss"]


def test_a_field_whose_name_only_begins_as_one_that_may_change_may_not():
    for may, may_not in (("data.train", "data.train_images"), ("distill.cache", "distill.cached_steps")):
        assert is_resumable(may)
        assert not is_resumable(may_not)
    assert is_resumable("mesh.data")


def test_a_resumed_run_may_change_where_it_is_computed(finished):
    moved = tiny(mesh=MeshConfig(data=8), run=RunConfig(log_every_steps=2))
    moved.model.remat = "full"
    assert run(moved, finished) == 0


def test_padded_evaluation_equals_one_pass_over_the_whole_set(mesh):
    recipe = tiny()
    _, validation = data.open_sources(recipe)
    with mesh(data=8):
        state = jax.jit(lambda: step.init_state(recipe))()
        kernel = jax.random.normal(jax.random.key(1), state.model.head_kernel.shape)
        state.model.head_kernel[...] = jax.sharding.reshard(kernel, state.model.head_kernel[...].sharding.spec)
        eval_fn = jax.jit(lambda model, batch: step.eval_step(recipe, model, batch))
        padded = evaluate(recipe, eval_fn, state.model, validation)
        whole = [validation[i] for i in range(len(validation))]
        images, labels = np.stack([image for image, _ in whole]), np.array([label for _, label in whole])
        placed = jax.device_put(images, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(("replica", "data"))))
        logits = np.asarray(jax.jit(lambda m, x: m(normalize(x, recipe.data)).logits)(state.model, placed))
    assert 360 % recipe.batch_size != 0
    assert padded["examples"] == 360
    assert padded["top1"] == np.mean(logits.argmax(1) == labels)
    assert padded["top5"] == np.mean(
        [label in row for label, row in zip(labels, (-logits).argsort(1)[:, :5], strict=True)]
    )
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    np.testing.assert_allclose(padded["loss"], -log_p[np.arange(360), labels].mean(), rtol=1e-5)


def test_training_and_evaluation_are_traced_once_per_run(tmp_path, monkeypatch):
    traced = {"train_step": 0, "classification_sums": 0}

    def counting(name, function):
        def wrapper(*args):
            traced[name] += 1
            return function(*args)

        return wrapper

    monkeypatch.setattr(step, "train_step", counting("train_step", step.train_step))
    monkeypatch.setattr(step, "classification_sums", counting("classification_sums", classification_sums))
    run(tiny(mesh=MeshConfig(data=8)), tmp_path / "run")
    assert traced == {"train_step": 1, "classification_sums": 1}


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    recipe = tiny(optim=OptimConfig(learning_rate=1e30, clip_norm=0.0), run=RunConfig(checkpoint_every_steps=1))
    with pytest.raises(FloatingPointError, match=r"step \d: loss=.*lower learning rate"):
        run(recipe, tmp_path / "run")
    saved = Checkpoints(tmp_path / "run" / "checkpoints", recipe).latest_step
    assert saved is not None
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path / "run", recipe).values())
