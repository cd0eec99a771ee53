"""launch/probe.py on small folders of images: what it keeps, what it leaves out, and what it says about it."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from launch import probe
from vit22b.config import DataConfig
from vit22b.errors import RecipeError
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
from vit22b.probing import run

MODEL = ModelConfig(
    width=16, depth=1, mlp_dim=16, num_heads=2, num_classes=3, image_size=8, patch_size=4, matmul="fp32"
)
QUICK = (
    *("--threads=1", "--extract_batch_size=8", "--learning_rates=0.1", "--weight_decays=0", "--epochs=2"),
    *("--batch_size=8", "--l2=1", "--neighbours=1,3,100", "--shots=1,4", "--shot_seeds=1"),
)
CLASSES = (b"ant", b"bee", b"caf\xe9")  # the last is no UTF-8


def make_folder(path: Path, counts: tuple[int, ...], seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    for name, count in zip(CLASSES, counts, strict=True):
        folder = os.path.join(os.fsencode(path), name)
        os.makedirs(folder)
        for i in range(count):
            Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(os.path.join(folder, b"%d.png" % i))
    return f"folder:{path}"


@pytest.fixture(scope="module")
def model(mesh):
    with mesh():
        return jax.jit(lambda: ViT(MODEL, jax.random.key(0)))()


@pytest.fixture
def start(tmp_path, monkeypatch, model):
    """`start(*flags)` probes an untrained model, times `scale`, on one device: the results and their folder."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)

    def started(*flags: str, scale: float = 1):
        scaled = jax.tree.map(lambda x: x * scale, model)
        monkeypatch.setattr(probe, "load", lambda *_: (scaled, DataConfig(train="", validation="")))
        before = set(tmp_path.glob("w/*/results.json"))
        probe.run(probe.parse(["--model=m", f"--workdir={tmp_path / 'w'}", "--dtype=fp32", *QUICK, *flags]))
        (path,) = set(tmp_path.glob("w/*/results.json")) - before
        return json.loads(path.read_text()), path.parent

    return started


def test_a_small_set_leaves_out_what_it_cannot_and_says_so(start, tmp_path, capsys):
    train, val = make_folder(tmp_path / "a", (10, 3, 10)), make_folder(tmp_path / "b", (4, 4, 4), seed=1)
    results, folder = start("--train", train, "--val", val)
    output, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "caf�" in page
    for remark in (
        "knn: 100 neighbours left out, as 20 images are trained on",  # one of each class is held out
        "sgd: few steps, 5 at --epochs=2 and --batch_size=8 on 20 images; more epochs or a smaller batch make more",
        "few_shot: 1 of 3 classes have fewer than 4 images, and give all",
    ):
        assert remark in results["remarks"]
        assert remark in output.splitlines()
        assert f'<p class="note">{remark}</p>' in page
    assert len(results["remarks"]) == 3
    assert results["settings"]["neighbours"] == [1, 3, 100]
    trials = {name: method["trials"] for name, method in results["methods"].items()}
    assert [trial["settings"]["neighbours"] for trial in trials["knn"]] == [1, 3]
    for trial in trials["knn"]:  # fewer neighbours than 5
        assert (trial["metrics"]["top5"], trial["metrics"]["loss"]) == (None, None)
    assert [trial["settings"]["steps"] for trial in trials["sgd"]] == [2 * 20 // 8]
    assert [few["shots"] for few in results["few_shot"]] == [1, 4]


def test_images_of_classes_without_training_images_are_told_and_not_decomposed(start, tmp_path):
    train, val = make_folder(tmp_path / "a", (10, 0, 10)), make_folder(tmp_path / "b", (4, 3, 4), seed=1)
    results, _ = start("--train", train, "--val", val, "--methods=ridge", f"--also=more={val}")
    told = "3 of 11 images are of classes that --train has no images of, and count as errors"
    assert results["remarks"] == [f"--val: {told}", f"--also=more: {told}"]
    with pytest.raises(RecipeError, match=f"^--decompose=true: needs images of every class; --val: {told}$"):
        start("--train", train, "--val", val, "--methods=ridge", "--decompose=true")


def test_features_of_other_images_under_the_same_names_are_refused(start, tmp_path):
    train, val = make_folder(tmp_path / "a", (4, 4, 4)), make_folder(tmp_path / "b", (3, 3, 3), seed=1)
    start("--train", train, "--val", val, "--methods=ridge")
    other = make_folder(tmp_path / "c", (3, 3, 3), seed=2)
    with pytest.raises(RecipeError, match=f"^--workdir={tmp_path / 'w'}: its features of val have content='"):
        start("--train", train, "--val", other, "--methods=ridge")


def test_results_of_another_model_or_other_images_lie_beside(start, tmp_path):
    """With the very same flags: the features are removed as the message about them says."""
    train, val = make_folder(tmp_path / "a", (4, 4, 4)), make_folder(tmp_path / "b", (3, 3, 3), seed=1)
    flags = ("--train", train, "--val", val, "--methods=ridge")
    start(*flags)
    (tmp_path / "w" / "features").rename(tmp_path / "old")
    start(*flags, scale=2)
    (tmp_path / "w" / "features").rename(tmp_path / "older")
    (tmp_path / "b" / "ant" / "0.png").write_bytes((tmp_path / "b" / "ant" / "1.png").read_bytes())
    start(*flags)
    assert len(list(tmp_path.glob("w/*/head.npz"))) == 3


def test_many_features_make_no_long_name(start, tmp_path):
    train, val = make_folder(tmp_path / "a", (4, 4, 4)), make_folder(tmp_path / "b", (3, 3, 3), seed=1)
    features = ",".join("+".join(["mean@last1"] * count) for count in range(1, 9))
    results, _ = start("--train", train, "--val", val, "--methods=ridge", "--features", features)
    assert len(results["methods"]["ridge"]["trials"]) == 8


def test_an_image_that_cannot_be_decoded_is_of_its_flag(start, tmp_path):
    train, val = make_folder(tmp_path / "a", (4, 4, 4)), make_folder(tmp_path / "b", (3, 3, 3), seed=1)
    (tmp_path / "b" / "bee" / "1.png").write_bytes(b"no image")
    with pytest.raises(RecipeError, match=f"^--val='{val}': cannot decode {tmp_path / 'b'}/bee/1.png"):
        start("--train", train, "--val", val, "--methods=ridge")


def test_a_page_that_fails_leaves_results_head_and_table(start, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(run, "write_page", fail)
    train, val = make_folder(tmp_path / "a", (4, 4, 4)), make_folder(tmp_path / "b", (3, 3, 3), seed=1)
    with pytest.raises(MemoryError):
        start("--train", train, "--val", val, "--methods=ridge")
    (folder,) = tmp_path.glob("w/sweep-*")
    assert {path.name for path in folder.iterdir()} == {"results.json", "head.npz"}
    assert "ridge *" in capsys.readouterr().out
