"""launch/probe.py as a user runs it: a work directory in, results out, and mistakes told in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from benchmarks import probe_speed
from distill import convert
from launch import probe
from recipes import smoke
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
from vit22b.probing.run import split
from vit22b.sources import open_source

ROOT = Path(__file__).parent.parent
QUICK = [
    *("--train", "digits", "--val", "digits", "--threads=1", "--dtype=fp32", "--extract_batch_size=128"),
    *("--learning_rates=0.1,0.5", "--weight_decays=0", "--epochs=2", "--batch_size=64", "--l2=1,100"),
    *("--neighbours=1,5", "--shots=1,5", "--shot_seeds=2"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, mesh):
    """A work directory of a model that nobody trained."""
    from vit22b.checkpoint import Checkpoints
    from vit22b.step import init_state
    from vit22b.workdir import open_workdir

    recipe = Recipe(
        name="encoder",
        total_steps=1,
        batch_size=8,
        model=ModelConfig(
            width=32, depth=2, mlp_dim=64, num_heads=2, num_classes=7, image_size=8, patch_size=2, matmul="fp32"
        ),
        data=DataConfig(train="digits", validation="digits", eval_crop_fraction=1.0),
    )
    folder = tmp_path_factory.mktemp("probe") / "encoder"
    open_workdir(folder, recipe, {})
    checkpoints = Checkpoints(folder / "checkpoints", recipe)
    with mesh():
        checkpoints.save(1, jax.jit(lambda: init_state(recipe))())
        checkpoints.wait()
    return folder


def run(encoder, workdir, *flags):
    """The results of a probe, in this process on its eight devices."""
    config = probe.parse(["--model", str(encoder), "--workdir", str(workdir), *QUICK, *flags])
    before = set(workdir.glob("*/results.json"))
    probe.run(config)
    (path,) = set(workdir.glob("*/results.json")) - before
    return json.loads(path.read_text()), path.parent


def test_a_probe_reports_what_its_head_does_on_the_reported_set(encoder, tmp_path):
    only_even = tmp_path / "even.json"
    only_even.write_text(json.dumps([c if c % 2 == 0 else None for c in range(10)]))
    results, folder = run(encoder, tmp_path / "w", f"--also=even=digits,classes={only_even}", "--decompose=true")
    assert set(results["methods"]) == {"sgd", "ridge", "knn"}
    assert [len(found["trials"]) for found in results["methods"].values()] == [2, 2, 2]
    assert results["selected_on"] == "holdout"
    assert results["holdout"]["images"] == 1437 - len(split(open_labels(), 0.1, 0)[0])
    winner = results["methods"][results["winner"]]
    trials = [trial["metrics"]["top1"] for trial in winner["trials"]]
    assert trials[winner["winner"]] == max(trials)
    # The head that was kept, applied to the features that were kept.
    assert results["winner"] in ("sgd", "ridge")
    head = np.load(folder / "head.npz")
    (features,) = (tmp_path / "w" / "features").glob("*/val")
    x, labels = (np.load(features / f"{name}-000000-00000.npy")[:360] for name in ("pooled", "labels"))
    logits = x @ head["kernel"] + head["bias"]
    assert winner["reported"]["metrics"]["top1"] == pytest.approx((logits.argmax(axis=1) == labels).mean(), abs=0.003)
    low, high = winner["reported"]["interval"]
    assert low < winner["reported"]["metrics"]["top1"] < high
    even = labels % 2 == 0
    (also,) = results["further"]
    among = logits[even][:, ::2].argmax(axis=1) * 2
    assert also["reported"]["metrics"]["examples"] == even.sum()
    assert also["reported"]["metrics"]["top1"] == pytest.approx((among == labels[even]).mean(), abs=0.006)
    parts = results["decomposition"]["parts"]
    total = parts["usability"] + parts["probe_generalization"] + parts["encoder_generalization"]
    assert total == pytest.approx(parts["total"])
    assert "</html>" in (folder / "report.html").read_text()


def open_labels():
    source = open_source("digits", "train", image_size=8, num_classes=10)
    return np.array([source[i][1] for i in range(len(source))])


@pytest.fixture(scope="module")
def shuffled_folder(tmp_path_factory):
    """The first digits of the validation set in a folder, and their numbers in the order of its classes and names."""
    source, folder = open_source("digits", "validation", image_size=8, num_classes=10), tmp_path_factory.mktemp("set")
    paths = {}
    for i in range(24):
        paths[f"{'zm'[i % 2]}/{(7 * i) % 24:02d}.png"] = i
    for path, i in paths.items():
        (folder / path).parent.mkdir(exist_ok=True)
        Image.fromarray(source[i][0]).save(folder / path)
    return folder, [paths[path] for path in sorted(paths)]


def test_labels_of_a_folder_are_in_the_order_of_classes_and_names(encoder, shuffled_folder, tmp_path):
    folder, order = shuffled_folder
    source = open_source("digits", "validation", image_size=8, num_classes=10)
    labels = np.array([source[i][1] for i in order])
    (tmp_path / "real.json").write_text(json.dumps([[int(label)] for label in labels]))
    flags = ("--methods=ridge", f"--also=real=folder:{folder},labels={tmp_path / 'real.json'}")
    results, written = run(encoder, tmp_path / "w", *flags)
    head = np.load(written / "head.npz")
    (features,) = (tmp_path / "w" / "features").glob("*/val")
    x = np.load(features / "pooled-000000-00000.npy")[order]
    right = (x @ head["kernel"] + head["bias"]).argmax(axis=1) == labels
    assert right.mean() > 0.5  # as no other order has
    assert results["further"][0]["reported"]["metrics"]["top1"] == right.mean()


@pytest.mark.parametrize(
    ("kind", "entries", "says"),
    [
        ("labels", 23, "23 entries; needs 24, one for each image"),
        ("classes", 3, "3 entries; needs 2, one for each class"),
    ],
)
def test_a_file_of_another_length_than_the_folder_is_refused(encoder, shuffled_folder, tmp_path, kind, entries, says):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([0] * entries))
    with pytest.raises(RecipeError) as error:
        run(encoder, tmp_path / "w", f"--also=real=folder:{shuffled_folder[0]},{kind}={path}")
    assert str(error.value) == f"--also={path}: has {says} of the set"
    assert not (tmp_path / "w").exists()


def test_of_augmented_features_nothing_is_kept(encoder, tmp_path):
    stored, _ = run(encoder, tmp_path, "--methods=sgd")
    kept = sorted(path for path in tmp_path.rglob("*.npy"))
    augmented, _ = run(encoder, tmp_path, "--methods=sgd", "--augment=crop_flip")
    assert sorted(path for path in tmp_path.rglob("*.npy")) == kept
    losses = [found["methods"]["sgd"]["reported"]["metrics"]["loss"] for found in (stored, augmented)]
    assert losses[0] != losses[1]


def test_the_logistic_protocol_is_scikit_learns_on_the_stored_features(encoder, tmp_path):
    flags = ("--protocol=logistic", "--methods=logistic", "--c=0.1,10", "--tolerance=1e-8")
    found = run(encoder, tmp_path, *flags)[0]["methods"]["logistic"]
    (kept,) = (tmp_path / "features").iterdir()
    x, labels = (np.load(kept / "train" / f"{name}-000000-00000.npy")[:1437] for name in ("pooled", "labels"))
    x_val, val_labels = (np.load(kept / "val" / f"{name}-000000-00000.npy")[:360] for name in ("pooled", "labels"))

    def expected(c, rows):
        return LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(x[rows].astype(np.float64), labels[rows])

    rows, held = split(labels, 0.1, 0)
    for trial in found["trials"]:
        top1 = expected(trial["settings"]["c"], rows).score(x[held], labels[held])
        assert trial["metrics"]["top1"] == pytest.approx(top1, abs=1e-6)
    best = found["trials"][found["winner"]]["settings"]["c"]
    assert found["reported"]["metrics"]["top1"] == expected(best, slice(None)).score(x_val, val_labels)


def test_heads_that_are_not_at_the_tolerance_are_told(encoder, tmp_path, capsys):
    run(encoder, tmp_path, "--methods=logistic", "--c=1,1e4", "--max_iterations=2", "--refit=false")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " heads of " in line]
    assert line.startswith("logistic: 2 of 2 heads of pooled not at --tolerance=1e-07: derivatives of up to 0.")
    assert line.endswith(", 2 iterations at most")


def test_selection_on_the_reported_set_is_said(encoder, tmp_path, capsys):
    results, folder = run(encoder, tmp_path, "--methods=ridge", "--select_on=val")
    assert results["selected_on"] == "validation"
    assert results["holdout"] is None
    best = max(trial["metrics"]["top1"] for trial in results["methods"]["ridge"]["trials"])
    assert results["methods"]["ridge"]["reported"]["metrics"]["top1"] == pytest.approx(best)
    assert "optimistic" in capsys.readouterr().out
    assert "optimistic" in (folder / "report.html").read_text()


def test_the_held_out_rows_are_a_part_of_every_class():
    labels = np.repeat(np.arange(4), [40, 10, 2, 1])
    rest, held = split(labels, 0.1, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=4), [4, 1, 1, 0])
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(53))
    assert not np.array_equal(held, split(labels, 0.1, seed=1)[1])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "m", "--train", "digits"], "--val='': give it"),
        (["--protocol", "dinov9"], "--protocol='dinov9': choose one of sweep"),
        (["--epoch=3"], "--epoch=3: not a flag; flags are --model"),
        (["--epochs"], "--epochs: needs a value"),
        (["--epochs=x"], "--epochs=x: needs integers"),
    ],
)
def test_flags_that_cannot_work_are_told(flags, says):
    with pytest.raises(RecipeError) as error:
        probe.parse(flags)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--val=digits:train"], "--val='digits:train': is the very set of --train"),
        (["--train=folder:/nowhere"], "--train='folder:/nowhere': /nowhere does not exist"),
        (["--features=cls"], "--features=cls: the encoder has no class token"),
        (["--image_size=9"], "model.image_size=9"),
        (["--batch_size=60"], "--batch_size=60: must be a multiple of the 8 devices"),
        (["--also=x"], "--also=x: needs NAME=SOURCE"),
        (["--also=x=folder:/nowhere"], "--also=x='folder:/nowhere': /nowhere does not exist"),
        (["--also=x=digits", "--also=y=digits,labels=/nowhere"], "--also=/nowhere: cannot be read as JSON"),
    ],
)
def test_mistakes_are_told_before_anything_is_extracted(encoder, tmp_path, flags, says):
    config = probe.parse(["--model", str(encoder), "--workdir", str(tmp_path / "w"), *QUICK, *flags])
    with pytest.raises(RecipeError) as error:
        probe.run(config)
    assert str(error.value).startswith(says)
    assert not (tmp_path / "w").exists()


def test_an_untrained_model_is_that_of_its_recipe(tmp_path, mesh):
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "import dataclasses\nfrom recipes import smoke\n\ndef get_config(width):\n    base = smoke.get_config()\n"
        "    return dataclasses.replace(base, model=dataclasses.replace(base.model, depth=1, width=int(width)))\n"
    )
    with mesh(1, 1, 1):
        found, data = probe.load(f"random:{recipe}:48", "fp32", {})
        right = jax.jit(lambda: ViT(found.config, jax.random.key(0)))()
    assert (data, found.config.width) == (smoke.get_config().data, 48)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # compiled in another way
    with pytest.raises(RecipeError, match="there is no recipe nowhere"):
        probe.load("random:nowhere.py", "fp32", {})


def test_how_images_are_made_is_asked_for_where_no_file_tells(encoder, tmp_path, mesh):
    """As of weights of big_vision; and what is given wins over a recipe."""
    shape = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2, "num_classes": 7, "image_size": 8, "patch_size": 4}
    biases = {"norm_bias": True, "qkv_bias": True, "proj_bias": True}
    config = ModelConfig(**shape, **biases, block="sequential", norm="layer", qk_norm="none", matmul="fp32")
    flags = ["--model=m", "--train=t", "--val=v", "--mean=0.5,0.4,0.3", "--std=1,1,1", "--eval_crop_fraction=0.9"]
    given = {name: getattr(probe.parse(flags), name) for name in ("mean", "std", "eval_crop_fraction")}
    name = f"npz:{tmp_path / 'm.npz'}"
    with mesh():
        convert.save(jax.jit(lambda: ViT(config, jax.random.key(0)))(), "npz", tmp_path / "m.npz")
        for known in ({}, {"mean": (0.5, 0.5, 0.5)}):
            with pytest.raises(RecipeError) as error:
                probe.load(name, "fp32", known)
            assert str(error.value).startswith(f"--model={name}: no file tells how images are made; give it, as in --")
            for flag in given:
                assert (f" --{flag}=" in str(error.value)) == (flag not in known)
        for model in (name, str(encoder)):
            data = probe.load(model, "fp32", given)[1]
            assert (data.mean, data.std, data.eval_crop_fraction) == ((0.5, 0.4, 0.3), (1, 1, 1), 0.9)


@pytest.mark.parametrize(
    ("text", "argument", "reason"),
    [
        ("def get_config(x): return int(x)", "", "TypeError: get_config"),
        ("def get_config(x): return int(x)", ":ten", "ValueError: invalid literal"),
        ("def get_config(: pass", "", "SyntaxError: invalid syntax"),
        ("config = 1", "", "KeyError: 'get_config'"),
        ("def get_config(): return 1", "", "get_config() must return a Recipe"),
    ],
)
def test_mistakes_in_a_recipe_are_told_in_one_line(tmp_path, text, argument, reason):
    (tmp_path / "r.py").write_text(text)
    name = f"random:{tmp_path / 'r.py'}{argument}"
    with pytest.raises(RecipeError) as error:
        probe.load(name, "fp32", {})
    assert str(error.value).startswith(f"--model={name}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_script_exits_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, "launch/probe.py", "--model", str(tmp_path), "--train=digits", "--val=digits"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == f"error: --model={tmp_path}: holds no recipe.json, as the folder of a run does"
    )


def test_the_benchmark_counts_the_work_of_all_heads_and_they_learn(tmp_path, monkeypatch, capsys):
    flags = ["--rows=2000", "--width=32", "--classes=4", "--heads=3", "--epochs=2", "--batch=64"]
    monkeypatch.setattr(sys, "argv", ["probe_speed.py", *flags, f"--json={tmp_path / 'lines'}"])
    assert probe_speed.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "lines").read_text()) == found
    rows = 2 * 2000 // 64 * 64
    assert found["rows_per_second"] * found["train_s"] == pytest.approx(rows)
    # Two matmuls of each head, a multiplication and an addition each.
    assert found["tflops_per_second"] * found["train_s"] == pytest.approx(2 * 2 * rows * 32 * 4 * 3 / 1e12)
    assert 1.3 < found["train_loss"] < np.log(4)


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe_speed.py", "--batch=60"])
    assert probe_speed.main() == 2
    assert capsys.readouterr().err == "error: --batch=60: must be a multiple of 8 devices\n"
