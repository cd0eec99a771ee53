"""Who teachers are: what tells them apart, what is refused before a run begins, what they see, and that they stay."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import MeshFactory
from teachers import DATA, MODEL, recipe

from distill import convert, teacher, teaching
from distill.config import DistillRecipe
from distill.features import Moments, batch_moments
from launch.preparation import live_teaching, load_teachers
from launch.tpu import run
from vit22b import data, memory
from vit22b.augment import eval_image
from vit22b.errors import RecipeError
from vit22b.names import named_leaves
from vit22b.sharding import check_divisibility
from vit22b.train import place


def fingerprint_of(name: str, mesh: MeshFactory, shape: tuple[int, int, int] = (1, 1, 1), **changes) -> str:
    with mesh(*shape):
        return teacher.fingerprint(teacher.load(teacher.resolved(recipe([name], **changes)))[0])


def test_a_teachers_fingerprint_is_of_what_decides_what_it_says(
    teachers: list[str], tmp_path: Path, mesh: MeshFactory
) -> None:
    """Not of the files, nor of how it was trained: written again, computed otherwise, or described by newer code."""
    one = fingerprint_of(teachers[0], mesh)
    assert fingerprint_of(teachers[0], mesh, (2, 2, 2)) == one
    assert fingerprint_of(teachers[0], mesh, sharding="replicated") == one
    with mesh():
        model, trained = convert.load_workdir(teachers[0])
        again = {"mean": trained.data.mean, "std": trained.data.std, "eval_crop_fraction": 1.0}
        convert.save_workdir(model, tmp_path / "again", "again", again, "elsewhere")
        model.head_bias[...] = model.head_bias[...].at[3].add(1e-3)
        convert.save_workdir(model, tmp_path / "changed", "changed", again, "elsewhere")
        convert.save_workdir(model, tmp_path / "seen", "seen", again | {"mean": (0.4, 0.5, 0.5)}, "elsewhere")
    assert fingerprint_of(str(tmp_path / "again"), mesh) == one
    path = tmp_path / "again" / "recipe.json"
    content = json.loads(path.read_text())
    content["recipe"] |= {"run.log_every_steps": 7, "model.remat": "full", "data.new": 1}
    path.write_text(json.dumps(content))
    assert fingerprint_of(str(tmp_path / "again"), mesh) == one
    content["recipe"] |= {"model.norm_epsilon": 1e-5}
    path.write_text(json.dumps(content))
    others = [fingerprint_of(str(tmp_path / name), mesh) for name in ("again", "changed", "seen")]
    assert len({one, *others}) == 4


def test_a_new_field_of_the_model_changes_no_fingerprint(
    teachers: list[str], mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, as_dict = fingerprint_of(teachers[0], mesh), dataclasses.asdict

    def of_an_older_version(each) -> dict:
        fields = as_dict(each)
        return {k: v for k, v in fields.items() if k != "rope_grid"} if isinstance(each, type(MODEL)) else fields

    monkeypatch.setattr(teacher.dataclasses, "asdict", of_an_older_version)
    assert fingerprint_of(teachers[0], mesh) == one


def with_own(name: str, folder: Path, **changes) -> str:
    """A teacher in a work directory of its own, of whose recipe some fields say something else."""
    shutil.copytree(name, folder)
    content = json.loads((folder / "recipe.json").read_text())
    content["recipe"] |= changes
    (folder / "recipe.json").write_text(json.dumps(content))
    return str(folder)


def test_a_teacher_sees_its_own_image_size_and_crop(teachers: list[str], tmp_path: Path) -> None:
    """Fixed teaching shows each the image as its own evaluation does, whatever the student's does."""
    other = with_own(teachers[1], tmp_path / "other", **{"data.eval_crop_fraction": 0.8, "data.eval_resize": "square"})
    given = recipe([teachers[0], other], mixup=0.0, teaching="fixed")
    given = dataclasses.replace(given, model=dataclasses.replace(given.model, image_size=16))
    own = teacher.resolved(given)
    assert own.distill.image_sizes == (8, 8)
    assert own.distill.eval_crop_fractions == (1.0, 0.8)
    assert own.distill.eval_resizes == ("short_side", "square")
    named = dataclasses.replace(
        given.distill, image_sizes=(12, 8), eval_crop_fractions=(0.5, 1.0), eval_resizes=("square", "square")
    )
    named_recipe = dataclasses.replace(given, distill=named)
    assert teacher.resolved(named_recipe).distill == named
    source, _ = data.open_sources(own)
    batches = data.train_batches(source, own, 0, 0, 1)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (16, 16, 16, 3)
    for i, fraction in enumerate((1.0, 0.8)):
        seen = dataclasses.replace(DATA, eval_crop_fraction=fraction)
        expected = [eval_image(source[data.source_index(j, len(source), 0)][0], seen, 8) for j in range(16)]
        np.testing.assert_array_equal(batch[f"teacher_image_{i}"], expected)
    wide = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    squeezed = dataclasses.replace(DATA, eval_crop_fraction=0.8, eval_resize="square")
    found = data.see(wide, own.views()[2], own, 0)
    np.testing.assert_array_equal(found, eval_image(wide, squeezed, 8))
    assert not np.array_equal(found, eval_image(wide, dataclasses.replace(DATA, eval_crop_fraction=0.8), 8))
    matching = dataclasses.replace(
        own, data=dataclasses.replace(own.data, mixup=1.0),
        distill=dataclasses.replace(own.distill, teaching="function_matching"),
    )  # fmt: skip
    assert [(view.name, view.size) for view in matching.views()] == [("image", 16)]


@pytest.mark.parametrize("match", ["logits", "features"])
def test_a_teachers_accuracy_is_that_of_its_own_evaluation_on_images_of_all_classes(
    match: str, teachers: list[str], tmp_path: Path, mesh: MeshFactory
) -> None:
    """Of a validation set that is sorted by class, as folders are."""
    name = with_own(teachers[0], tmp_path / "other", **{"data.eval_crop_fraction": 0.6})
    features = {"match": "features", "widths": (32,), "statistics_batches": 1} if match == "features" else {}
    given, notes = recipe([name], **features), []
    with mesh():
        given, loaded = load_teachers(given)
        train, validation = data.open_sources(given)
        order = np.argsort([validation[i][1] for i in range(len(validation))], kind="stable")
        by_class = validation.only(order, b"by class")
        live_teaching(given, loaded, (train, by_class), notes.append)
        chosen = order[np.linspace(0, len(order) - 1, 64).astype(int)]
        seen = dataclasses.replace(DATA, eval_crop_fraction=0.6)
        images = np.stack([eval_image(validation[int(i)][0], seen, 8) for i in chosen])
        labels = np.array([validation[int(i)][1] for i in chosen])
        logits = jax.jit(lambda m, x: m(x).logits)(
            loaded[0].model, place({"x": np.float32(images / 255 - 0.5) / 0.5})["x"]
        )
    top1 = np.mean(np.asarray(logits).argmax(1) == labels)
    assert set(labels) == set(range(10))
    assert any(f"top-1 {top1:.4f} on 64 evenly spaced validation images" in note for note in notes)


def test_what_is_refused_of_teachers_leaves_no_work_directory(teachers: list[str], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(teachers[0]) / "recipe.json", bare)
    for name, message in (
        ("nowhere", "distill.teachers=nowhere: holds no recipe.json"),
        (str(bare), r"distill.teachers=.*bare: checkpoints=.*has none"),
        (f"{teachers[0]}@S", r"distill.teachers=.*@S: the models of .* are student$"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(recipe([name]), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_teachers_that_do_not_fit_together_are_refused_before_they_are_loaded(
    teachers: list[str], mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mesh():
        needed = [
            4 * sum(x.size for x in named_leaves(each.model).values())
            for each in teacher.load(teacher.resolved(recipe(teachers)))
        ]
        monkeypatch.setattr(memory, "device_memory", lambda device: sum(needed) - 1)
        monkeypatch.setattr(teacher.frozen, "load", None)
        with pytest.raises(RecipeError, match=r"distill\.teachers=.*: parameters need .* in fp32, there are"):
            teacher.load(teacher.resolved(recipe(teachers)))


def test_no_array_of_a_teacher_changes_in_a_run(teachers: list[str], tmp_path: Path, monkeypatch) -> None:
    loaded, load = [], teacher.load

    def kept(given: DistillRecipe) -> list[teacher.Teacher]:
        loaded.extend(load(given))
        before.extend(np.asarray(x) for x in jax.tree.leaves([each.model for each in loaded]))
        return loaded

    before: list[np.ndarray] = []
    monkeypatch.setattr(teacher, "load", kept)
    assert run(recipe(teachers[:1]), tmp_path) == 0
    after = jax.tree.leaves([each.model for each in loaded])
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_teacher_in_fp8_says_about_what_it_says_in_fp32(teachers: list[str], mesh: MeshFactory) -> None:
    said = {}
    with mesh():
        for matmul in ("fp32", "fp8"):
            given = teacher.resolved(recipe(teachers[:1], matmul=matmul))
            loaded = teacher.load(given)
            source, _ = data.open_sources(given)
            batches = data.train_batches(source, given, 0, 0, 1)
            said[matmul] = np.asarray(teaching.Teaching(given, loaded)(place(next(batches)), 0)["logits_0"])
            batches.close()
    apart = np.abs(said["fp8"] - said["fp32"]).mean() / said["fp32"].std()
    assert 1e-3 < apart < 0.2


def test_moments_of_features_far_from_zero_do_not_cancel() -> None:
    rng = np.random.default_rng(0)
    parts = [np.float32(1000 + 0.3 * rng.normal(size=(n, 8, 3))) for n in (16, 64, 5)]
    moments = Moments()
    for part in parts:
        moments.add(part.shape[0] * 8, *(np.asarray(x) for x in batch_moments(jax.numpy.asarray(part))))
    whole = np.concatenate([np.float64(part).reshape(-1, 3) for part in parts])
    mean, deviation = moments.result()
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, whole.std(0), rtol=1e-3)


def test_a_feature_that_does_not_vary_is_left_as_it_is() -> None:
    moments = Moments()
    moments.add(4, np.array([2.0]), np.array([0.0]))
    assert [x.tolist() for x in moments.result()] == [[2.0], [1.0]]


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"more_students": ("Ti",)}, (1, 1, 4), r"distill\.more_students=Ti: mesh\.model=4: .* model\.num_heads=3"),
        (
            {"match": "features", "widths": (32,), "adaptor_dim": 30},
            (1, 4, 1),
            r"distill\.adaptor_dim=30: must be a multiple of mesh\.data=4",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_all_that_is_trained_is_refused(changes: dict, shape, message: str) -> None:
    given = recipe(["runs/teacher"], **changes)
    given = dataclasses.replace(given, model=dataclasses.replace(given.model, num_heads=4))
    with pytest.raises(RecipeError, match=message):
        check_divisibility(given, shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": ("runs/a,runs/b",)}, r"distill.teachers=runs/a,runs/b: .* \('runs/a', 'runs/b'\)"),
        ({"teachers": (1,)}, r"distill.teachers=\(1,\): needs work directories"),
        ({"image_sizes": ("8",)}, r"distill.image_sizes=\('8',\): needs positive integers"),
        ({"image_sizes": (-8,)}, r"distill.image_sizes=\(-8,\): needs positive integers"),
        ({"weights": ("1",)}, r"distill.weights=\('1',\): needs positive numbers"),
        ({"weights": (0.0,)}, r"distill.weights=\(0.0,\): needs positive numbers"),
        ({"eval_crop_fractions": (2.0,)}, r"distill.eval_crop_fractions=\(2.0,\): needs numbers from 0.1 to 1"),
        ({"widths": (32,)}, r"distill.widths=\(32,\): has no effect with distill.match='logits'"),
        (
            {"match": "features", "widths": (32,), "temperature": 2.0},
            r"distill.temperature=2.0: has no effect with distill.match='features'",
        ),
        (
            {"match": "features", "widths": (32,), "summary_weight": 0.0, "patch_weight": 0.0},
            r"distill.summary_weight=0: .* nothing is learned",
        ),
    ],
)
def test_a_value_that_cannot_work_or_has_no_effect_is_refused(changes: dict, message: str) -> None:
    given = recipe(["runs/teacher"])
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(given, distill=dataclasses.replace(given.distill, **changes)).validate()
