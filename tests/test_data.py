"""Sources and streams: what they yield, against an independent value, and in which order."""

import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
from os.path import commonpath
from pathlib import Path

import numpy as np
import pytest

# First, and not where it is used: while TFDS is imported, Python's import is replaced by one that refuses relative
# imports, which semaphores of earlier tests' workers need if they are collected just then.
import tensorflow_datasets as tfds
from PIL import Image

from vit22b import data
from vit22b.config import DataConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.model_config import ModelConfig
from vit22b.sources import open_source

ROOT = Path(__file__).parent.parent


def make_recipe(*, batch_size=24, seed=0, image_size=8, num_classes=10, **overrides):
    model = ModelConfig(
        width=8, depth=1, mlp_dim=8, num_heads=1, num_classes=num_classes, image_size=image_size, patch_size=image_size
    )
    settings = {"train": "digits", "validation": "digits", "crop": "resize", "flip": False, "threads": 2} | overrides
    return Recipe(
        name="test", total_steps=1, batch_size=batch_size, seed=seed, model=model, data=DataConfig(**settings)
    )


def opened(spec, split="train"):
    return open_source(spec, split, image_size=8, num_classes=10)


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def joined(per_process):
    """What all processes get, in their order, as one batch per step."""
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*per_process, strict=False)
    ]


def numbered(path, count):
    """A source of 8 x 8 images whose pixels, like their label, say which image it is."""
    labels = np.arange(count)
    np.savez(path, images=np.broadcast_to(labels[:, None, None].astype(np.uint8), (count, 8, 8)), labels=labels)
    return opened(f"npz:{path}")


# Streams.


def test_the_seed_fixes_order_and_augmentation():
    source = opened("digits")
    streams = [
        take(data.train_batches(source, make_recipe(seed=seed, crop="inception"), 0, 0, 1), 3) for seed in (5, 5, 6)
    ]
    assert_same(streams[0], streams[1])
    assert any((a["label"] != b["label"]).any() for a, b in zip(streams[0], streams[2], strict=True))


def test_batches_are_the_images_of_the_source_with_their_labels(tmp_path):
    source = numbered(tmp_path / "n.npz", 50)
    for batch in take(data.train_batches(source, make_recipe(), 0, 0, 1), 5):
        assert batch["image"].shape == (24, 8, 8, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert (batch["image"] == batch["label"][:, None, None, None]).all()


@pytest.mark.parametrize("batch_size", [7, 24, 120])  # of 50 images: a divisor of none, several epochs in a batch
def test_every_sample_comes_once_per_epoch_and_each_epoch_in_another_order(tmp_path, batch_size):
    source = numbered(tmp_path / "n.npz", 50)
    stream = data.train_batches(source, make_recipe(batch_size=batch_size), 0, 0, 1)
    labels = np.concatenate([batch["label"] for batch in take(stream, -(-200 // batch_size))])[:200].reshape(4, 50)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.broadcast_to(np.arange(50), (4, 50)))
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 4


def test_an_image_is_augmented_anew_in_each_epoch():
    source = opened("digits")
    recipe = make_recipe(batch_size=1437, crop="inception", threads=4)
    epochs = take(data.train_batches(source, recipe, 0, 0, 1), 2)
    order = [[data.source_index(i, 1437, 0) for i in range(start, start + 1437)] for start in (0, 1437)]
    first, second = (epoch["image"][np.argsort(indices)] for epoch, indices in zip(epochs, order, strict=True))
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.95  # crops of 8 x 8 may coincide


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_all_processes_make_up_the_batch_of_one(count):
    source, recipe = opened("digits"), make_recipe(crop="inception", flip=True, augment="randaugment")
    whole = take(data.train_batches(source, recipe, 0, 0, 1), 3)
    parts = [take(data.train_batches(source, recipe, 0, p, count), 3) for p in range(count)]
    assert all(len(batch["label"]) == 24 // count for part in parts for batch in part)
    assert_same(joined(parts), whole)


@pytest.mark.parametrize("start", [1, 3, 60, 61, 120])  # 1437 images, 24 a step: epochs end in steps 59 and 119
def test_a_stream_started_at_a_step_continues_the_uninterrupted_one(start):
    source, recipe = opened("digits"), make_recipe(crop="shift", flip=True)
    whole = take(data.train_batches(source, recipe, 0, 0, 1), start + 3)
    assert_same(take(data.train_batches(source, recipe, start, 0, 1), 3), whole[start:])


def test_threads_and_prefetching_do_not_change_the_stream():
    source = opened("digits")
    streams = [
        take(data.train_batches(source, make_recipe(crop="inception", threads=t, prefetch_batches=p), 0, 0, 1), 8)
        for t, p in ((1, 1), (8, 5))
    ]
    assert_same(*streams)


def test_worker_processes_do_not_change_any_batch():
    source, validation = opened("digits"), opened("digits", "validation")
    alone, helped = (make_recipe(crop="inception", flip=True, workers=workers) for workers in (0, 2))
    assert_same(*(take(data.train_batches(source, recipe, 58, 1, 2), 5) for recipe in (alone, helped)))
    assert_same(*(list(data.eval_batches(validation, recipe, 0, 1)) for recipe in (alone, helped)))


def test_a_stream_ends_for_good_when_closed():
    stream = data.train_batches(opened("digits"), make_recipe(), 0, 0, 1)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("length", [1, 23, 24, 50])
def test_evaluation_covers_the_set_exactly_once(tmp_path, length, count):
    source = numbered(tmp_path / "n.npz", length)
    parts = [list(data.eval_batches(source, make_recipe(), p, count)) for p in range(count)]
    assert {len(part) for part in parts} == {-(-length // 24)}  # no process may miss a collective operation
    batches = joined(parts)
    labels, mask = (np.concatenate([batch[key] for batch in batches]) for key in ("label", "mask"))
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < length)
    np.testing.assert_array_equal(labels[:length], np.arange(length))
    assert (images[:length] == np.arange(length)[:, None, None, None]).all()
    assert not labels[length:].any()
    assert not images[length:].any()
    assert mask.dtype == np.float32


@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 70_001])
def test_epochs_of_large_sets_are_permutations(length):
    order = np.array([data.source_index(length + i, length, 3) for i in range(length)])
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


@pytest.mark.parametrize("length", [50_000, 2**20, 1_281_167])
def test_shuffled_neighbours_are_uncorrelated(length):
    order = np.array([data.source_index(i, length, 1) for i in range(20_000)])
    for lag in (1, 2, 4):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 4 / np.sqrt(20_000)


SCRIPT = """
import multiprocessing
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from vit22b import config, data


def backends(step):
    jax = sys.modules["jax"]  # Grain has imported it
    count = len(jax._src.xla_bridge._backends)
    return {"backends": np.array([count]), "child": np.array([multiprocessing.parent_process() is not None])}


if __name__ == "__main__":
    settings = config.DataConfig(train="digits", validation="digits", workers=1)
    stream = data._prefetch(backends, 0, 2, settings)
    print([{key: int(value[0]) for key, value in batch.items()} for batch in stream])
    left = data._prefetch(backends, 0, 10**9, settings)
    next(left)  # and never closed
"""


def test_workers_of_a_script_start_no_jax_backend_and_leave_nothing_behind(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "vit22b").symlink_to(ROOT / "vit22b")
    script = tmp_path / "launch" / "gpu.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == str([{"backends": 0, "child": 1}] * 2), result.stderr
    assert result.stderr == ""  # neither tracebacks nor leaked shared memory


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_the_stream_with_its_name(tmp_path, workers):
    write_folder(tmp_path, {"a/1.jpg": (80, 80), "a/2.jpg": (80, 80)})
    (tmp_path / "a" / "2.jpg").write_bytes((tmp_path / "a" / "1.jpg").read_bytes()[:-20])
    stream = data.train_batches(opened(f"folder:{tmp_path}"), make_recipe(workers=workers), 0, 0, 1)
    with pytest.raises(RecipeError) as caught:
        next(stream)
    stream.close()
    message = rf"data.train='folder:{tmp_path}': cannot decode {tmp_path}/a/2.jpg \(OSError: .*\); repair or replace it"
    assert re.fullmatch(message, str(caught.value))


# Sources.


def write_folder(folder, files):
    """Grey images of these sizes; the n-th has grey value 10 n."""
    for n, (name, size) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 10 * n).save(path)


def test_digits_are_scikit_learns_split_in_two():
    from sklearn.datasets import load_digits

    expected = load_digits()
    parts = [opened("digits", split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [1437, 360]
    samples = [part[i] for part in parts for i in range(len(part))]
    scaled = (expected.images * 255 / 16 + 0.5).astype(np.uint8)  # 0 .. 16 to 0 .. 255, no value halfway
    assert sorted((image[..., 0].tobytes(), label) for image, label in samples) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(scaled, expected.target, strict=True)
    )
    assert all((image == image[..., :1]).all() for image, _ in samples)
    counts = [np.bincount([part[i][1] for i in range(len(part))]) for part in parts]
    assert min(counts[0]) > 130  # every class in both splits
    assert min(counts[1]) > 20


def test_synthetic_images_differ_cost_no_memory_and_have_uniform_labels():
    source = open_source("synthetic", "train", image_size=32, num_classes=7)
    assert len(source) == 1_281_167
    assert len(opened("synthetic", "validation")) == 50_000
    samples = [source[i] for i in range(0, 1_281_167, 1281)]
    assert len({image.tobytes() for image, _ in samples}) > 0.98 * len(samples)
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image, _ in samples)
    counts = np.bincount([label for _, label in samples], minlength=7)
    assert (np.abs(counts - len(samples) / 7) < 60).all()
    np.testing.assert_array_equal(source[12345][0], pickle.loads(pickle.dumps(source))[12345][0])
    assert len(pickle.dumps(source)) < 100_000
    assert np.shares_memory(source[0][0], source.read.args[0])


def test_npz_yields_its_pixels_split_at_n_train(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 6, 5, 3), np.uint8), rng.integers(0, 4, 10)
    labels[0] = 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels, n_train=7)
    train, validation = (opened(f"npz:{tmp_path}/a.npz", split) for split in ("train", "validation"))
    assert (len(train), len(validation), train.num_classes, validation.num_classes) == (7, 3, 4, 4)
    for i, (image, label) in enumerate([train[i] for i in range(7)] + [validation[i] for i in range(3)]):
        np.testing.assert_array_equal(image, images[i])
        assert label == labels[i]
    assert len(opened(f"npz:{tmp_path}/a.npz:val", "train")) == 3


def test_npz_without_n_train_serves_either_field_and_repeats_grey(tmp_path):
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 1], np.uint8))
    for split in ("train", "validation"):
        source = opened(f"npz:{tmp_path}/a.npz", split)
        assert len(source) == 3
        np.testing.assert_array_equal(source[2][0], np.stack([images[2]] * 3, axis=-1))
    with pytest.raises(RecipeError, match=r"no split 'validation'; splits there: train"):
        opened(f"npz:{tmp_path}/a.npz:validation")


@pytest.mark.parametrize("sizes", [{"n_train": 6}, {"split_sizes": [6, 3, 2]}])
def test_a_jpeg_pack_decodes_like_the_files_it_was_made_of(tmp_path, sizes):
    rng = np.random.default_rng(0)
    jpegs = []
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.jpg", quality=75)
        jpegs.append((tmp_path / f"{i}.jpg").read_bytes())
    length = len(commonpath(jpegs))
    scans = [jpeg[length:].removesuffix(b"\xff\xd9") for jpeg in jpegs]
    labels = np.array([0, 1, 2, 0, 1, 2, 4, 0, 1, 65535, 65535], np.uint16)
    labels = labels if "split_sizes" in sizes else labels % 3
    np.savez(
        tmp_path / "pack.npz",
        **{"header0" if "split_sizes" in sizes else "header": np.frombuffer(jpegs[0][:length], np.uint8)},
        scans=np.frombuffer(b"".join(scans), np.uint8),
        lengths=np.array([len(scan) for scan in scans], np.uint16),
        labels=labels,
        **sizes,
    )
    train, validation = (opened(f"npz:{tmp_path}/pack.npz", split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (6, 3 if "split_sizes" in sizes else 5)
    assert train.num_classes == validation.num_classes == (5 if "split_sizes" in sizes else 3)
    for source, start in ((train, 0), (validation, 6)):
        source = pickle.loads(pickle.dumps(source))
        for i in range(len(source)):
            np.testing.assert_array_equal(source[i][0], np.asarray(Image.open(tmp_path / f"{start + i}.jpg")))
            assert source[i][1] == labels[start + i]
    if "split_sizes" in sizes:
        with pytest.raises(RecipeError, match=r"no split 'test'; splits there: train, validation$"):
            opened(f"npz:{tmp_path}/pack.npz:test")


def test_a_folder_numbers_its_sorted_subfolders_and_finds_files_of_any_depth(tmp_path):
    files = {"b/x.PNG": (5, 4), "b/deep/er/y.jpeg": (3, 3), "a:1/z.bmp": (2, 2), "c/w.webp": (9, 9)}
    write_folder(tmp_path, files | {".cache/h.png": (1, 1), "c/._w.png": (1, 1), "loose.png": (1, 1)})
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    source = pickle.loads(pickle.dumps(opened(f"folder:{tmp_path}")))
    assert source.class_names == ("a:1", "b", "c", "empty")
    assert source.num_classes == 4
    found = [(image.shape[:2], label) for image, label in (source[i] for i in range(len(source)))]
    assert found == [((2, 2), 0), ((3, 3), 1), ((4, 5), 1), ((9, 9), 2)]
    assert source[2][0].tolist() == [[[0, 0, 0]] * 5] * 4
    with pytest.raises(IndexError):
        source[4]


def test_a_folder_of_splits_gives_each_field_its_own(tmp_path):
    root = tmp_path / "with:colon"
    write_folder(root, {"train/a/1.png": (1, 1), "val/a/2.png": (2, 2), "test/a/3.png": (3, 3)})
    sizes = {
        (spec, split): opened(f"folder:{root}{spec}", split)[0][0].shape[0]
        for spec in ("", ":train", ":val", ":validation", ":test", "/test")
        for split in ("train", "validation")
    }
    assert [sizes[spec, "train"] for spec in ("", ":train", ":val", ":validation", ":test", "/test")] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert [sizes[spec, "validation"] for spec in ("", ":train", ":test")] == [2, 1, 3]
    shutil.rmtree(root / "val")
    assert opened(f"folder:{root}", "validation")[0][0].shape[0] == 3  # test, for want of another
    with pytest.raises(RecipeError, match=r"no validation/CLASS/IMAGE in .*; splits there: train, test$"):
        opened(f"folder:{root}:val", "validation")


def write_modes(folder):
    """The same 4 x 6 picture in every mode; returns name -> the RGB it should decode to."""
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    grey = rgb[..., 0]
    deep = grey.astype(np.uint16) * 257 - np.uint16(3) * (grey > 0)  # 16 bits whose upper 8 are grey, or one less
    palette = np.arange(48, dtype=np.uint8).reshape(16, 3)[::-1]
    indices = grey % np.uint8(16)
    (folder / "a").mkdir(parents=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turned by 90 degrees to the left; viewers turn it back
    image = Image.fromarray(rgb)
    image.save(folder / "a" / "rgb.png")
    image.save(folder / "a" / "exif.png", exif=rotated)
    Image.fromarray(grey).save(folder / "a" / "grey.png")
    Image.fromarray(np.dstack([grey, 255 - grey])).save(folder / "a" / "grey_alpha.png")
    Image.fromarray(np.dstack([rgb, grey])).save(folder / "a" / "alpha.png")
    Image.fromarray(deep).save(folder / "a" / "deep.png")
    Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1").save(folder / "a" / "bits.png")
    for name, options in (("palette", {}), ("transparent", {"transparency": bytes([0, 128] + [255] * 14)})):
        paletted = Image.fromarray(indices, "P")
        paletted.putpalette(palette.tobytes())
        paletted.save(folder / "a" / f"{name}.png", **options)
    three = np.stack([grey] * 3, axis=-1)
    return {
        "rgb": rgb,
        "exif": np.rot90(rgb, -1),
        "grey": three,
        "grey_alpha": three,
        "alpha": rgb,
        "deep": np.stack([deep >> 8] * 3, axis=-1),
        "bits": (three > 127) * 255,
        "palette": palette[indices],
        "transparent": palette[indices],
    }


@pytest.mark.filterwarnings("error")
def test_images_of_every_mode_become_rgb_bytes(tmp_path):
    expected = write_modes(tmp_path)
    source = opened(f"folder:{tmp_path}")
    for i, name in enumerate(sorted(expected)):
        image, _ = source[i]
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, expected[name], err_msg=name)


def test_cmyk_jpegs_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a" / "red.jpg", quality=100)
    image, _ = opened(f"folder:{tmp_path}")[0]
    np.testing.assert_allclose(image.astype(int), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=4)


def write_tfds(folder, files):
    """A data set `tiny` in TFDS's array_record format, by its own writer; 'train' has all files but two, 'test' two."""
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
                )
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, manager):
                return {"train": self._generate_examples(files[:-2]), "test": self._generate_examples(files[-2:])}

            def _generate_examples(self, files):
                for file in files:
                    yield file.name, {"image": file, "label": len(file.name) % 5}

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_modes(folder / "images")
    write_tfds(folder, sorted((folder / "images" / "a").iterdir()))
    return folder


def test_tfds_yields_what_its_writer_was_given_without_tensorflow(tfds_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    expected = write_modes(tmp_path)
    names = sorted(expected)
    sources = {
        spec: pickle.loads(pickle.dumps(opened(f"tfds:tiny{spec}"))) for spec in ("", ":test", ":1.0.0:train[3:5]")
    }
    assert [len(source) for source in sources.values()] == [7, 2, 2]
    wanted = {"": names[:-2], ":test": names[-2:]}
    for spec, files in wanted.items():
        source = sources[spec]
        assert source.num_classes == len(source.label_names) == 5
        got = sorted((image.tobytes(), label) for image, label in (source[i] for i in range(len(source))))
        assert got == sorted((expected[name].astype(np.uint8).tobytes(), len(name + ".png") % 5) for name in files)
    for i in range(2):
        np.testing.assert_array_equal(sources[":1.0.0:train[3:5]"][i][0], sources[""][3 + i][0])
    assert len(opened("tfds:tiny", "validation")) == 2  # test, for want of a validation split
    assert "tensorflow" not in sys.modules


def test_tfds_errors_are_one_line_saying_what_to_do(tfds_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    errors = {}
    for spec in ("tiny:dev", "tiny:train[:x]", "mnistt", "mnist", "", "tiny:2.0.0"):
        with pytest.raises(RecipeError) as caught:
            opened(f"tfds:{spec}")
        errors[spec] = str(caught.value)
        assert errors[spec].startswith(f"data.train='tfds:{spec}': ")
        assert "\n" not in errors[spec]
    assert "splits there: train, test" in errors["tiny:dev"]
    assert "splits there: train, test" in errors["tiny:train[:x]"]
    assert errors["mnistt"].endswith("not found; did you mean 'mnist'?")
    assert f"{tfds_dir}/mnist/3.0.1" in errors["mnist"]
    assert "tfds build mnist --file_format=array_record" in errors["mnist"]
    assert "2.0.0" in errors["tiny:2.0.0"]
    assert "as in 'tfds:imagenet2012'" in errors[""]
    # Prepared in the default format, which only TensorFlow reads, and in order.
    shutil.copytree(tfds_dir / "tiny", tmp_path / "tiny")
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(RecipeError, match=r"not prepared as array_record in .* --file_format=array_record"):
        opened("tfds:tiny")
    assert "tensorflow" not in sys.modules


def test_fingerprints_follow_the_data_and_not_their_place(tmp_path):
    write_folder(tmp_path / "one", {"a/1.png": (1, 1), "b/2.png": (1, 1)})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (opened(f"folder:{tmp_path}/{name}").fingerprint() for name in ("one", "two"))
    assert one == two
    assert one.startswith("folder-2-")
    (tmp_path / "two" / "b" / "2.png").rename(tmp_path / "two" / "a" / "2.png")
    assert opened(f"folder:{tmp_path}/two").fingerprint() != one
    prints = set()
    for labels in ([0, 1], [0, 1], [1, 0], [0, 2]):
        np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
        prints.add(opened(f"npz:{tmp_path}/a.npz").fingerprint())
    assert len(prints) == 3
    assert opened("digits").fingerprint() != opened("digits:validation").fingerprint()


# Errors.


def test_mistaken_sources_are_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "flat", {"1.png": (1, 1)})
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "keys.npz", x=np.zeros(1), y=np.zeros(1))
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 4, 4, 3)), labels=np.zeros(2, int))
    np.savez(tmp_path / "count.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(3, int))
    np.savez(tmp_path / "labels.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros((2, 10)))
    np.savez(tmp_path / "split.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(2, int), n_train=3)
    expected = {
        "imagenet": "unknown kind of source 'imagenet'; kinds: digits, synthetic, npz, folder, tfds",
        "foldr:/x": "unknown kind of source 'foldr'; kinds: digits, synthetic, npz, folder, tfds; "
        "did you mean 'folder'?",
        "digits:test": "no split 'test'; splits there: train, validation",
        "synthetic:foo": "no split 'foo'; splits there: train, validation",
        "folder:": "needs a path, as in 'folder:/data/birds'",
        "folder:/no/such": "/no/such does not exist on this machine",
        f"folder:{tmp_path}/empty": f"no images in {tmp_path}/empty; needs CLASS/IMAGE there, "
        "with .jpg .jpeg .png .webp .bmp",
        f"folder:{tmp_path}/flat": f"no images in {tmp_path}/flat; needs CLASS/IMAGE there, "
        "with .jpg .jpeg .png .webp .bmp",
        f"folder:{tmp_path}/flat:dev": "no split 'dev'; splits are named train, validation, val, test",
        f"folder:{tmp_path}/flat:test": f"no test/CLASS/IMAGE in {tmp_path}/flat; splits there: none",
        f"npz:{tmp_path}/text.npz": f"{tmp_path}/text.npz is no .npz file, as numpy.savez writes it",
        f"npz:{tmp_path}/keys.npz": "has keys x, y; needs images and labels",
        f"npz:{tmp_path}/float.npz": "images are float64 (2, 4, 4, 3); needs uint8 (2, H, W, 3) or (2, H, W)",
        f"npz:{tmp_path}/count.npz": "images are uint8 (2, 4, 4, 3); needs uint8 (3, H, W, 3) or (3, H, W)",
        f"npz:{tmp_path}/labels.npz": "labels are float64 (2, 10); needs integers (N,) from 0 up",
        f"npz:{tmp_path}/split.npz": "splits of [3, -1] images do not add up to 2",
    }
    got = {}
    for spec in expected:
        with pytest.raises(RecipeError) as caught:
            opened(spec)
        got[spec] = str(caught.value)
    assert got == {spec: f"data.train={spec!r}: {message}" for spec, message in expected.items()}


def test_mismatches_between_sources_and_model_are_told_in_one_line(tmp_path):
    write_folder(tmp_path, {"train/a/1.png": (1, 1), "train/b/1.png": (1, 1), "val/b/1.png": (1, 1)})
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 4, 4), np.uint8), labels=np.zeros(0, int))
    np.savez(tmp_path / "one.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, int))
    cases = {
        "model.num_classes=9: data.train='digits' has 10 classes; give at least as many": {"num_classes": 9},
        f"data.validation='npz:{tmp_path}/none.npz': has no images": {"validation": f"npz:{tmp_path}/none.npz"},
        f"data.validation='npz:{tmp_path}/one.npz': is the very set of data.train; name another file or folder, "
        "or a split": {"train": f"npz:{tmp_path}/one.npz", "validation": f"npz:{tmp_path}/one.npz"},
        f"data.validation='folder:{tmp_path}': class folders differ from data.train's in a; "
        "make empty ones if need be": {"train": f"folder:{tmp_path}", "validation": f"folder:{tmp_path}"},
    }
    for message, settings in cases.items():
        with pytest.raises(RecipeError) as caught:
            data.open_sources(make_recipe(**settings))
        assert str(caught.value) == message
    (tmp_path / "val" / "a").mkdir()
    train, validation = data.open_sources(make_recipe(train=f"folder:{tmp_path}", validation=f"folder:{tmp_path}"))
    assert [source[0][1] for source in (train, validation)] == [0, 1]


def test_a_batch_that_processes_cannot_share_is_told_in_one_line():
    for batches in (
        lambda: data.train_batches(opened("digits"), make_recipe(batch_size=24), 0, 0, 5),
        lambda: data.eval_batches(opened("digits"), make_recipe(batch_size=24), 0, 5),
    ):
        with pytest.raises(RecipeError, match=r"^batch_size=24: must be a multiple of the 5 processes; try 25$"):
            batches()


def test_some_of_the_training_images_are_the_same_ones_for_every_seed():
    whole, validation = data.open_sources(make_recipe())
    some, same = data.open_sources(make_recipe(train_images=50, seed=3))
    assert len(some) == 50
    assert same.fingerprint() == validation.fingerprint()
    assert some.fingerprint() != whole.fingerprint()
    images = [whole[i][0].tobytes() for i in range(len(whole))]
    found = [images.index(some[i][0].tobytes()) for i in range(50)]
    assert found == sorted(set(found))
    assert [some[i][1] for i in range(50)] == [whole[i][1] for i in found]
    again, _ = data.open_sources(make_recipe(train_images=50, seed=4))
    assert again.fingerprint() == some.fingerprint()
    assert pickle.loads(pickle.dumps(again))[7][1] == some[7][1]
    too_many = make_recipe(train_images=1438)
    with pytest.raises(RecipeError, match=r"has 1437 images, fewer than data\.train_images=1438"):
        data.open_sources(too_many)
