"""Distillation: what teachers see and say, what students lose, and that teachers stay as they are."""

import dataclasses
import functools
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory
from scipy.special import log_softmax
from teachers import recipe

from distill import teacher, teaching
from distill.config import DistillRecipe
from distill.losses import agreement, divergence, unexplained
from launch.tpu import run
from vit22b import data
from vit22b.checkpoint import Checkpoints
from vit22b.config import MeshConfig, OptimConfig, Recipe
from vit22b.data import open_sources
from vit22b.errors import RecipeError
from vit22b.model_config import ALL_SIZES
from vit22b.names import named_leaves
from vit22b.optim import Independent, clip
from vit22b.report import read_metrics
from vit22b.sharding import concrete
from vit22b.step import abstract_state, init_state, train_step
from vit22b.train import place


def annotated(given: DistillRecipe, mesh: MeshFactory) -> tuple[dict, dict, list[teacher.Teacher], teaching.Teaching]:
    """The first batch of the pipeline, and what becomes of it."""
    with mesh():
        given = teacher.resolved(given)
        found = teacher.load(given)
        live = teaching.Teaching(given, found)
        source, _ = open_sources(given)
        live.find_statistics(source)
        batches = data.train_batches(source, given, 0, 0, 1)
        batch = next(batches)
        batches.close()
        taught = live(place(batch), 0)
        expected = given.objective().batch()
        assert {k: (v.shape, v.dtype) for k, v in taught.items()} == {
            k: (v.shape, v.dtype) for k, v in expected.items()
        }
        return batch, {name: np.asarray(value, np.float32) for name, value in taught.items()}, found, live


def test_divergence_and_agreement_by_hand() -> None:
    rng = np.random.default_rng(0)
    student, theirs = rng.normal(size=(2, 6, 5)) * 3
    t = 2.5
    p = np.exp(log_softmax(theirs / t, axis=1))
    expected = t**2 * (p * (log_softmax(theirs / t, axis=1) - log_softmax(student / t, axis=1))).sum(1).mean()
    found = divergence(jnp.float32(student), jnp.float32(theirs), t)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(jnp.float32(student), jnp.float32(student), t)) == pytest.approx(0, abs=1e-6)
    same = np.mean(student.argmax(1) == theirs.argmax(1))
    assert float(agreement(jnp.float32(student), jnp.float32(theirs))) == pytest.approx(same)
    assert float(unexplained(jnp.float32(student), jnp.float32(theirs))) == pytest.approx(
        np.mean((student - theirs) ** 2), rel=1e-5
    )


def test_teachers_judge_the_very_images_that_the_student_sees_each_with_its_own_normalisation(
    teachers: list[str], mesh: MeshFactory
) -> None:
    """What the student gets is mixed; undone its normalisation, and done the teacher's, the teacher says the same."""
    given = recipe(teachers)
    batch, taught, found, _ = annotated(given, mesh)
    pixels = (taught["image"] * 0.5 + 0.5) * 255
    assert not np.allclose(pixels, batch["image"])  # mixed
    for i, (each, mean) in enumerate(zip(found, (0.5, 0.3), strict=True)):
        with mesh():
            images = jnp.float32((pixels / 255 - mean) / 0.5)
            logits = jax.jit(lambda m, x: m(x).logits)(each.model, place({"x": np.asarray(images)})["x"])
        np.testing.assert_allclose(taught[f"logits_{i}"], logits, atol=2e-5)
        assert np.ptp(logits) > 0.1
    assert taught["targets"].sum(1) == pytest.approx(1)
    assert (taught["targets"].max(1) < 1).any()


def test_views_of_the_four_ways_of_teaching(teachers: list[str], mesh: MeshFactory) -> None:
    seen = {}
    for way in ("consistent", "independent", "fixed"):
        given = recipe(teachers[:1], mixup=0.0, teaching=way)
        batch, taught, _, _ = annotated(given, mesh)
        seen[way] = batch
        np.testing.assert_allclose((taught["image"] * 0.5 + 0.5) * 255, batch["image"], atol=1e-3)
    assert "teacher_image" not in seen["consistent"]
    for way, name in (("independent", "teacher_image"), ("fixed", "teacher_image_0")):
        np.testing.assert_array_equal(seen[way]["image"], seen["consistent"]["image"])
        assert not np.array_equal(seen[way][name], seen["consistent"]["image"])
    source, _ = open_sources(given)
    originals = [source[data.source_index(i, len(source), 0)][0] for i in range(16)]
    np.testing.assert_array_equal(seen["fixed"]["teacher_image_0"], np.stack(originals))


def test_a_teacher_sees_the_same_crop_at_its_own_size(teachers: list[str], mesh: MeshFactory) -> None:
    given = recipe(teachers[:1], mixup=0.0, image_sizes=(16,))
    batch, taught, found, _ = annotated(given, mesh)
    assert batch["image"].shape == (16, 16, 16, 3)
    with mesh():
        large = jnp.float32((batch["image"] / 255.0 - 0.5) / 0.5)
        logits = jax.jit(lambda m, x: m(x).logits)(found[0].model, place({"x": np.asarray(large)})["x"])
    np.testing.assert_allclose(taught["logits_0"], logits, atol=2e-5)
    # The student's is that view, half as large: by blocks of two pixels the means agree.
    halves = np.asarray(large).reshape(16, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(taught["image"] - halves).mean() < 0.1 * np.abs(halves - halves.mean()).mean()


def test_features_are_standardised_and_aligned_to_the_students_grid(teachers: list[str], mesh: MeshFactory) -> None:
    given = recipe(teachers, match="features", widths=(32, 48), statistics_batches=1, adaptor_dim=24)
    _, taught, found, _ = annotated(given, mesh)
    for i, width in enumerate((32, 48)):
        for name, shape in ((f"summary_{i}", (16, width)), (f"patches_{i}", (16, 4, width))):
            assert taught[name].shape == shape  # the second teacher's grid is 4 x 4, the student's 2 x 2
            features = taught[name].reshape(-1, width)
            np.testing.assert_allclose(features.mean(0), 0, atol=0.02)  # over the very batch of the statistics
            np.testing.assert_allclose(features.std(0), 1, atol=0.02)
    assert found[1].config.class_token


def final_state(workdir: Path, given: DistillRecipe, shape: tuple[int, int, int], mesh: MeshFactory) -> dict:
    with mesh(*shape) as m:
        state = Checkpoints(workdir / "checkpoints", given).restore(concrete(abstract_state(given), m))
        return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@pytest.fixture(scope="module")
def finished(teachers: list[str], tmp_path_factory) -> tuple[DistillRecipe, Path]:
    """A run with both teachers, on one device."""
    given, workdir = recipe(teachers), tmp_path_factory.mktemp("runs") / "whole"
    before = {path: path.read_bytes() for path in Path(teachers[0]).rglob("*") if path.is_file()}
    assert run(given, workdir) == 0
    assert {path: path.read_bytes() for path in Path(teachers[0]).rglob("*") if path.is_file()} == before
    losses = read_metrics(workdir)["train/loss"]
    assert losses[4] < losses[1]
    return given, workdir


def test_a_checkpoint_holds_the_student_alone(finished: tuple[DistillRecipe, Path], mesh: MeshFactory) -> None:
    given, workdir = finished
    alone = Recipe(name="x", total_steps=4, batch_size=16, model=given.model, data=given.data, optim=given.optim)
    state = final_state(workdir, alone, (1, 1, 1), mesh)  # of a supervised run of the same model
    with mesh():
        expected = named_leaves(abstract_state(alone))
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in expected.items()}


def test_eight_devices_distil_as_one_does(finished: tuple[DistillRecipe, Path], tmp_path, mesh: MeshFactory) -> None:
    given, workdir = finished
    assert run(dataclasses.replace(given, mesh=MeshConfig(replica=2, data=2, model=2)), tmp_path) == 0
    eight = final_state(tmp_path, given, (1, 1, 1), mesh)
    for name, value in final_state(workdir, given, (1, 1, 1), mesh).items():
        np.testing.assert_allclose(eight[name], value, atol=3e-5, err_msg=name)


def test_a_run_stopped_by_a_signal_resumes_bitwise(
    finished: tuple[DistillRecipe, Path], tmp_path: Path, mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, workdir = finished
    preempted = Checkpoints.preempted

    def signalled_at_three(self, at):  # between two planned checkpoints
        if at == 3:
            signal.raise_signal(signal.SIGTERM)
        return preempted(self, at)

    monkeypatch.setattr(Checkpoints, "preempted", signalled_at_three)
    assert run(given, tmp_path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run(given, tmp_path) == 0
    resumed = final_state(tmp_path, given, (1, 1, 1), mesh)
    for name, value in final_state(workdir, given, (1, 1, 1), mesh).items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a size smaller than any there is."""
    monkeypatch.setitem(ALL_SIZES, "0.5M", (16, 1, 32, 2))
    return "0.5M"


def test_students_in_one_run_are_those_of_runs_of_their_own(small: str, teachers: list[str], mesh: MeshFactory) -> None:
    """One step from the same parameters: the others' gradients and norms have no part in a student's."""
    together = dataclasses.replace(
        recipe(teachers[:1], more_students=(small,)), optim=OptimConfig(learning_rate=1e-2, clip_norm=0.01)
    )
    _, taught, _, _ = annotated(together, mesh)
    with mesh():
        state = jax.jit(functools.partial(init_state, together))()
        assert isinstance(state.model, Independent)
        batch = place({k: v.astype(together.objective().batch()[k].dtype) for k, v in taught.items()})
        after, metrics = jax.jit(functools.partial(train_step, together))(state, batch)
        assert {"agreement", f"{small}/agreement"} <= set(metrics)
        for name, config in together.students().items():
            alone = dataclasses.replace(
                together, model=config, distill=dataclasses.replace(together.distill, more_students=())
            )
            own = jax.jit(functools.partial(init_state, alone))()
            own = dataclasses.replace(own, model=state.model.models[name])
            stepped, _ = jax.jit(functools.partial(train_step, alone))(own, batch)
            expected, found = named_leaves(stepped.model), named_leaves(after.model.models[name])
            for leaf, value in expected.items():
                np.testing.assert_allclose(found[leaf], value, atol=2e-6, err_msg=f"{name} {leaf}")


def test_independent_models_are_clipped_each_by_its_own_norm() -> None:
    gradients = Independent({"a": {"x": jnp.array([3.0, 4.0])}, "b": {"x": jnp.array([0.3, 0.4])}})
    clipped, norm = clip(gradients, 1.0, unrolled=True)
    np.testing.assert_allclose(clipped.models["a"]["x"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped.models["b"]["x"], [0.3, 0.4], rtol=1e-6)
    assert float(norm) == pytest.approx(np.hypot(5, 0.5))


def test_labels_take_their_part_of_the_loss(teachers: list[str], mesh: MeshFactory) -> None:
    """Twice, with different weights: both equations give the same two losses, by hand from the student's logits."""
    given = recipe(teachers, weights=(1.0, 0.5), temperature=2.0)
    _, taught, _, _ = annotated(given, mesh)
    rng = np.random.default_rng(0)
    with mesh() as m:
        batch = place({k: v.astype(given.objective().batch()[k].dtype) for k, v in taught.items()})
        model = jax.jit(given.objective().init)(jax.random.key(0))
        head = rng.normal(size=model.head_kernel.shape).astype(np.float32)
        model.head_kernel[...] = jax.device_put(head, model.head_kernel[...].sharding)
        plain = dataclasses.replace(given, model=dataclasses.replace(given.model, stochastic_depth=0.0))
        logits = np.asarray(jax.jit(lambda model, x: model(x).logits)(model, batch["image"]), np.float64)
        found = []
        for weight in (0.0, 0.25):
            r = dataclasses.replace(plain, distill=dataclasses.replace(given.distill, label_weight=weight))
            model.config = r.model
            found.append(float(jax.jit(r.objective().loss)(model, batch, jax.random.key(1))[0]))
        assert m.size == 1
    labels = -(taught["targets"] * log_softmax(logits, axis=1)).sum(1).mean()

    def teachers_part(i: int) -> float:
        theirs, own = (log_softmax(x / 2.0, axis=1) for x in (taught[f"logits_{i}"].astype(np.float64), logits))
        return 4 * (np.exp(theirs) * (theirs - own)).sum(1).mean()

    taught_loss = teachers_part(0) + 0.5 * teachers_part(1)
    assert found[0] == pytest.approx(taught_loss, rel=1e-4)
    assert found[1] == pytest.approx(0.75 * taught_loss + 0.25 * labels, rel=1e-4)


def test_a_run_of_several_students_evaluates_each(small: str, teachers: list[str], tmp_path: Path) -> None:
    given = recipe(teachers[:1], match="features", widths=(32,), adaptor_dim=16, more_students=(small,))
    assert run(dataclasses.replace(given, total_steps=2), tmp_path) == 0
    metrics = read_metrics(tmp_path)
    for prefix in ("", f"{small}/"):
        assert set(metrics[f"validation/{prefix}top1"]) == {2}
        for name in ("summary", "patches", "label_loss"):  # far from what a constant would lose
            assert 0.3 < metrics[f"train/{prefix}{name}"][2] < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": ("nowhere",)}, "nowhere: holds no recipe.json"),
        ({"image_sizes": (10,)}, r"distill.image_sizes=10: .* has patches of 4; try 8"),
        ({"match": "features", "widths": (31,)}, r"distill.widths=31: .* has features of 32"),
        ({"match": "features"}, r"distill.widths=\(\): needs one value for each of 1 teacher"),
        ({"teaching": "fixed"}, r"data.mixup=1.0: 0 with distill.teaching='fixed'"),
        ({"teaching": "patient"}, r"distill.teaching=.*function_matching"),
        ({"more_students": ("XXL",)}, r"distill.more_students=.*22B"),
        ({"temperature": 0.0}, r"distill.temperature=0.0: must be positive"),
    ],
)
def test_mistakes_are_told_in_a_line(changes: dict, message: str, teachers: list[str], mesh: MeshFactory) -> None:
    given = recipe(teachers[:1])
    given = dataclasses.replace(given, distill=dataclasses.replace(given.distill, **changes))

    def start() -> None:
        given.validate()
        teacher.load(teacher.resolved(given))

    with mesh(), pytest.raises(RecipeError, match=message) as raised:
        start()
    assert "\n" not in str(raised.value)


def test_another_teacher_is_no_teacher_of_a_resumed_run(finished: tuple[DistillRecipe, Path]) -> None:
    given, workdir = finished
    first, second = given.distill.teachers
    other = dataclasses.replace(given, distill=dataclasses.replace(given.distill, teachers=(second, first)))
    with pytest.raises(RecipeError, match="holds another run, with teacher 0"):
        run(other, workdir)
