"""Teachers' words from a cache are those of the teachers, for the same views, in the same order, and for no others."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory
from scipy.special import log_softmax
from teachers import recipe

from distill import cache, top_classes
from distill.config import DistillRecipe
from launch.preparation import load_teachers, preparation, teacher_fingerprints
from launch.teach import teach
from launch.tpu import run
from vit22b import data
from vit22b.errors import RecipeError
from vit22b.report import read_metrics
from vit22b.train import place


def cached(teachers: list[str], folder: Path, **changes) -> DistillRecipe:
    return recipe(teachers, cache=str(folder), cached_steps=4, top_k=10, **changes)


@pytest.fixture(scope="module")
def written(teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> DistillRecipe:
    """The cache of both teachers for four steps, in two chunks; after a kill in the second it is the same."""
    folder = tmp_path_factory.mktemp("cache") / "views"
    given = cached(teachers, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CHUNK_STEPS", 2)
        teach(given)
        first, second = sorted(folder.glob("*.arrayrecord"))
        before = [path.read_bytes() for path in (first, second)]
        second.rename(second.with_suffix(".tmp"))  # half a file, for all that the next start knows
        age = first.stat().st_mtime_ns
        teach(given)
        assert first.stat().st_mtime_ns == age
        assert [path.read_bytes() for path in (first, second)] == before
    return given


def batches(given: DistillRecipe, steps: range, mesh: MeshFactory) -> list[dict[str, np.ndarray]]:
    """What the train step gets in these steps."""
    found = []
    with mesh():
        sources = data.open_sources(given)
        given, loaded = load_teachers(given)
        fingerprints = {"train": sources[0].fingerprint(), **teacher_fingerprints(loaded)}
        prepare = preparation(given, loaded, sources, fingerprints, lambda text: None)
        stream = data.train_batches(sources[0], given, steps.start, 0, 1)
        for step in steps:
            batch = prepare(place(next(stream)), step)
            found.append({name: np.asarray(x, np.float32) for name, x in batch.items()})
        stream.close()
    return found


def test_views_are_those_of_live_teaching_and_what_is_said_of_them_too(
    written: DistillRecipe, mesh: MeshFactory
) -> None:
    """Then they begin anew, mixed as before."""
    live, stored = batches(written.without_cache(), range(4), mesh), batches(written, range(6), mesh)
    for step, found in enumerate(stored):
        expected = live[step % 4]
        assert found.keys() == expected.keys()
        for name in ("image", "targets"):
            np.testing.assert_array_equal(found[name], expected[name])
        for name in ("logits_0", "logits_1"):  # of log-probabilities fp16 has three digits
            np.testing.assert_allclose(found[name], log_softmax(expected[name], axis=1), atol=5e-3)
    assert not np.array_equal(live[0]["image"], live[1]["image"])


def test_a_run_from_a_cache_is_that_with_the_teachers(written: DistillRecipe, tmp_path: Path) -> None:
    assert run(written.without_cache(), tmp_path / "live") == 0
    assert run(written, tmp_path / "cached") == 0
    live, stored = (read_metrics(tmp_path / name)["train/loss"] for name in ("live", "cached"))
    assert stored == pytest.approx(live, rel=2e-3)


@pytest.mark.parametrize("teaching", ["function_matching", "independent"])
def test_features_are_stored_as_they_are_matched(
    teaching: str, teachers: list[str], tmp_path: Path, mesh: MeshFactory
) -> None:
    """Standardised over more batches than are cached, of what a teacher alone may see."""
    mixup = float(teaching == "function_matching")
    features = {"match": "features", "widths": (32,), "statistics_batches": 5, "teaching": teaching}
    given = cached(teachers[:1], tmp_path / "views", mixup=mixup, **features)
    teach(given)
    live, stored = batches(given.without_cache(), range(2), mesh), batches(given, range(2), mesh)
    for one, other in zip(live, stored, strict=True):
        for name, value in one.items():  # compiled on its own, a teacher now and then rounds to the other side
            np.testing.assert_allclose(other[name], value, rtol=2**-7, atol=2e-4, err_msg=name)


def test_other_processes_read_their_parts_of_what_two_have_written(
    teachers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, rng = cached(teachers[:1], tmp_path / "views"), np.random.default_rng(0)
    classes = rng.integers(0, 10, (4, 16, 10)).astype(np.int32)
    said = [{"classes_0": c, "log_probs_0": -c.astype(np.float16), "others_0": c[:, 0] / 3} for c in classes]

    def act_as(process: int, count: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    for process in range(2):
        act_as(process, 2)
        part = slice(8 * process, 8 * process + 8)
        writer = cache.Writer(tmp_path / "views", given, {"seed": 0})
        for steps in writer.missing():
            writer.write(steps, ({name: x[part] for name, x in said[step].items()} for step in steps))
        # What one process has, after a kill, and the other has not, both do again: teachers need all devices.
        assert writer.missing() == ([range(4)] if process == 0 else [])
    for count in (1, 2, 4):
        for process in range(count):
            act_as(process, count)
            reader = cache.Reader(tmp_path / "views", given, {"seed": 0})
            part = slice(16 // count * process, 16 // count * (process + 1))
            for step in (0, 1, 3, 6):
                found = reader(step)
                np.testing.assert_array_equal(found["classes_0"], classes[step % 4][part])
                np.testing.assert_array_equal(found["log_probs_0"], -classes[step % 4][part].astype(np.float16))
                np.testing.assert_array_equal(found["others_0"], np.float32(classes[step % 4][part, 0] / 3))


def sharp_logits(temperature: float) -> np.ndarray:
    """(64, 40): one class far ahead, the more the higher the temperature, and the others close to one another."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 40))
    logits[np.arange(64), rng.integers(0, 40, 64)] += 8 * temperature
    return logits.astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_is_stored_of_a_distribution_is_that_at_the_temperature(temperature: float) -> None:
    """Up to fp16, of whose values 11 bits count; what all others have together is exact, and spread evenly."""
    logits, k = sharp_logits(temperature), 8
    exact = log_softmax(np.float64(logits) / temperature, axis=1)
    classes, log_probs, others = top_classes.most_probable(jnp.asarray(logits), k, temperature)
    log_probs = jnp.asarray(np.asarray(log_probs, np.float16))
    found = np.asarray(top_classes.all_log_probs(classes, log_probs, others, 40), np.float64)
    top = np.argsort(-exact, axis=1)[:, :k]
    left = np.exp(exact)
    np.put_along_axis(left, top, 0.0, axis=1)
    expected = np.repeat(np.log(left.sum(1, keepdims=True) / (40 - k)), 40, axis=1)
    np.put_along_axis(expected, top, np.take_along_axis(exact, top, axis=1), axis=1)
    np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-5)
    # To the student, who sees the softmax of what is stored, this is what the even spread costs, and nothing else.
    found = log_softmax(found, axis=1)
    spread, cost = ((np.exp(exact) * (exact - each)).sum(1).mean() for each in (expected, found))
    assert cost == pytest.approx(spread, rel=0.01)


def test_the_teachers_distribution_comes_from_a_cache_at_its_temperature(
    teachers: list[str], tmp_path: Path, mesh: MeshFactory
) -> None:
    given = recipe(teachers[1:], cache=str(tmp_path / "views"), cached_steps=1, top_k=9, temperature=3.0)
    teach(given)
    (live,), (stored,) = batches(given.without_cache(), range(1), mesh), batches(given, range(1), mesh)
    # With nine of ten classes stored the tenth is what is left.
    expected, found = (log_softmax(np.float64(x["logits_0"]) / 3, axis=1) for x in (live, stored))
    np.testing.assert_allclose(found, expected, atol=3e-3)
    assert not np.allclose(np.sort(expected), np.sort(log_softmax(live["logits_0"], axis=1)), atol=3e-3)


def test_classes_beyond_two_bytes_are_stored_whole(tmp_path: Path) -> None:
    given = recipe(["nobody"], top_k=2)
    large = dataclasses.replace(given, model=dataclasses.replace(given.model, num_classes=70_000))
    layout = cache.Layout.of(large)
    view = {"classes_0": np.array([69_999, 5]), "log_probs_0": np.zeros(2), "others_0": np.float64(-1)}
    _, arrays = layout.unpack([layout.pack(0, view)])
    assert arrays["classes_0"].tolist() == [[69_999, 5]]
    assert layout.size == 8 + 2 * (4 + 2) + 4
    assert cache.Layout.of(given).size == 8 + 2 * (1 + 2) + 4


def test_the_distance_to_what_is_stored_is_the_total_variation() -> None:
    """Of the classes that are stored, with all others as one; whichever order they come in."""
    mine, theirs, temperature = sharp_logits(1.0), sharp_logits(1.0)[::-1], 2.0
    stored = top_classes.most_probable(jnp.asarray(theirs), 5, temperature)
    p, q = (np.exp(log_softmax(np.float64(x) / temperature, axis=1)) for x in (mine, theirs))
    top = np.asarray(stored[0])
    p, q = (np.take_along_axis(x, top, axis=1) for x in (p, q))
    expected = 0.5 * (np.abs(p - q).sum(1) + np.abs(p.sum(1) - q.sum(1)))
    found = top_classes.variation(jnp.asarray(mine), *stored, temperature)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.mean() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: dataclasses.replace(r, distill=dataclasses.replace(r.distill, temperature=2.0)),
            "with distill.temperature=1.0, not 2.0",
        ),
        (lambda r: dataclasses.replace(r, seed=1), "is of other views, with seed=0, not 1"),
        (lambda r: dataclasses.replace(r, data=dataclasses.replace(r.data, flip=False)), "with data.flip=True"),
        (
            lambda r: dataclasses.replace(r, distill=dataclasses.replace(r.distill, cached_steps=8)),
            "with distill.cached_steps=4, not 8",
        ),
        (
            lambda r: dataclasses.replace(r, distill=dataclasses.replace(r.distill, teachers=r.distill.teachers[::-1])),
            "with teacher 0 fingerprint",
        ),
        (
            lambda r: dataclasses.replace(r, distill=dataclasses.replace(r.distill, cache="nowhere")),
            "distill.cache=nowhere: has no manifest.json",
        ),
    ],
)
def test_a_cache_of_other_views_is_refused(change, message: str, written: DistillRecipe, mesh: MeshFactory) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        batches(change(written), range(1), mesh)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["classes", "log_probs"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_cache_that_says_something_else_is_refused(
    wrong: str, at: int, written: DistillRecipe, tmp_path: Path, mesh: MeshFactory
) -> None:
    """The same probabilities for other classes, or the other way round, at any of the steps that are looked at."""
    source = cache.Reader(Path(written.distill.cache), written, identity_of(written))
    writer = cache.Writer(tmp_path / "views", written, identity_of(written))

    def said(step: int) -> dict[str, np.ndarray]:
        return {n: x[:, ::-1] if n == f"{wrong}_0" and step == at else x for n, x in source(step).items()}

    for steps in writer.missing():
        writer.write(steps, (said(step) for step in steps))
    with pytest.raises(RecipeError, match=f"of step {at}'s views the teachers say something else .logits_0: "):
        batches(elsewhere(written, tmp_path / "views"), range(1), mesh)


def elsewhere(given: DistillRecipe, folder: Path) -> DistillRecipe:
    return dataclasses.replace(given, distill=dataclasses.replace(given.distill, cache=str(folder)))


@pytest.fixture
def copied(written: DistillRecipe, tmp_path: Path) -> tuple[DistillRecipe, Path]:
    """A copy of the cache, and its second chunk."""
    shutil.copytree(written.distill.cache, tmp_path / "views")
    return elsewhere(written, tmp_path / "views"), tmp_path / "views" / "views-000001-00000.arrayrecord"


@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_a_chunk_that_was_cut_off_is_missing(
    left: float, copied: tuple[DistillRecipe, Path], mesh: MeshFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CHUNK_STEPS", 2)
    given, chunk = copied
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: int(left * len(whole))])
    identity = identity_of(given)
    with pytest.raises(RecipeError, match=r"lacks 1 whole files .views-000001-00000\.arrayrecord.; run launch/teach"):
        cache.Reader(Path(given.distill.cache), given, identity)
    assert cache.Writer(Path(given.distill.cache), given, identity).missing() == [range(2, 4)]


def test_a_chunk_that_is_damaged_is_named(copied: tuple[DistillRecipe, Path]) -> None:
    given, chunk = copied
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:104] + bytes(64) + whole[168:])  # records; how many there are is told at the end
    reader = cache.Reader(Path(given.distill.cache), given, identity_of(given))
    assert reader(1)
    with pytest.raises(RecipeError, match=r"views-000001-00000\.arrayrecord is damaged; delete it and run launch"):
        reader(2)


def test_another_programs_manifest_is_no_caches(teachers: list[str], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"identity": {"name": "a phone"}}')
    given = cached(teachers, tmp_path)
    with pytest.raises(RecipeError, match=r"its manifest\.json is not a cache's; give a new folder"):
        cache.Writer(tmp_path, given, {"seed": 0})


def test_a_field_that_one_version_alone_has_decides_nothing(written: DistillRecipe) -> None:
    identity = identity_of(written)
    folder = Path(written.distill.cache)
    assert cache.Reader(folder, written, {**identity, "data.new": 1})(0)
    del identity["data.flip"]
    assert cache.Reader(folder, written, identity)(0)


def identity_of(given: DistillRecipe) -> dict:
    return json.loads((Path(given.distill.cache) / cache.MANIFEST).read_text())["identity"]
