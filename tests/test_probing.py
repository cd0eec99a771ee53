"""Probing: features by name, their store, and the grid of heads that SGD trains in one pass."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit22b import data
from vit22b.augment import eval_image, train_image
from vit22b.config import DataConfig
from vit22b.errors import RecipeError
from vit22b.mix import normalize
from vit22b.model import ViT
from vit22b.model_config import ModelConfig
from vit22b.probing import sgd, store
from vit22b.probing.config import PROTOCOLS, ProbeConfig, protocol_fields, typed
from vit22b.probing.encoder import digest, encoder_of
from vit22b.probing.features import parse_feature, see, width
from vit22b.probing.heads import Heads, measure, predict
from vit22b.probing.methods import augmented_batches
from vit22b.probing.rows import Features
from vit22b.sources import open_source
from vit22b.train import place

MODEL = ModelConfig(
    width=8,
    depth=3,
    mlp_dim=16,
    num_heads=2,
    num_classes=10,
    image_size=8,
    patch_size=4,
    class_token=True,
    num_registers=2,
    matmul="fp32",
)
CONFIG = ProbeConfig(
    model="m",
    train="digits",
    val="digits",
    features=("pooled", "cls@last2+mean"),
    dtype="fp32",
    extract_batch_size=16,
    threads=1,
)


def make_model(config=MODEL, seed=0):
    """All parameters random: also what starts as zeros or ones."""
    model = jax.jit(lambda: ViT(config, jax.random.key(seed)))()
    keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), model)


def make_encoder(config=CONFIG, model=None):
    return encoder_of(model or make_model(), DataConfig(train="", validation=""), config)


def digits(split="train"):
    return open_source("digits", split, image_size=8, num_classes=10)


# Features


@pytest.mark.parametrize("final_norm", ["tokens", "pooled", "none"])
def test_features_are_the_named_activations(mesh, final_norm):
    pool = "cls" if final_norm == "pooled" else "map"
    config = dataclasses.replace(MODEL, final_norm=final_norm, pool=pool)
    with mesh(data=2):
        model = make_model(config)
        images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
        names = ("pooled", "cls", "mean", "cls@1", "mean@last2", "mean@2+cls@last3", "pixels", "pixels+cls")
        terms = {name: parse_feature(name, config) for name in names}
        found = {name: np.asarray(x) for name, x in see(model, place({"x": images})["x"], terms).items()}
        output = model(place({"x": images})["x"], layers=(0, 1, 2))
        layers, pooled = np.asarray(output.layers), np.asarray(output.pooled)
        scale = np.asarray(model.norm.scale[...]) if model.norm is not None else None

    def norm(x):
        return x if scale is None else x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def cls(block):
        return norm(layers[block - 1][:, 0])

    def mean(block):
        x = layers[block - 1][:, 3:]  # behind the class token and two registers
        return norm(x.mean(axis=1)) if final_norm == "pooled" else norm(x).mean(axis=1)

    expected = {
        "pooled": pooled,
        "cls": cls(3),
        "mean": mean(3),
        "cls@1": cls(1),
        "mean@last2": np.concatenate([mean(2), mean(3)], axis=1),
        "mean@2+cls@last3": np.concatenate([mean(2), cls(1), cls(2), cls(3)], axis=1),
        "pixels": images.reshape(4, -1),
        "pixels+cls": np.concatenate([images.reshape(4, -1), cls(3)], axis=1),
    }
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert width(terms[name], config, 8) == found[name].shape[1]
    if final_norm == "pooled":  # the encoder's own pooling is the class token
        np.testing.assert_allclose(found["pooled"], found["cls"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max", "give pooled, cls, mean"),
        ("pooled@2", "give pooled, cls, mean"),
        ("pixels@2", "or pixels"),
        ("cls+", "'' is none"),
        ("mean@4", "blocks 1 to 3"),
        ("mean@0", "blocks 1 to 3"),
        ("mean@last9", "blocks 1 to 3"),
    ],
)
def test_a_feature_that_is_none_is_refused(name, says):
    with pytest.raises(RecipeError, match=f"--features={name.replace('+', '.')}: .*{says}"):
        parse_feature(name, MODEL)


def test_a_class_token_is_asked_of_those_who_have_one():
    with pytest.raises(RecipeError, match="no class token"):
        parse_feature("cls", dataclasses.replace(MODEL, class_token=False))


# Stored features


@pytest.fixture(scope="module")
def extracted(mesh, tmp_path_factory):
    """Of 1,437 digits, which neither 16 nor the chunks of 200 divide: one device's."""
    folder = tmp_path_factory.mktemp("one") / "features" / "train"
    with mesh(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_ROWS", 208)
        return extract(folder, make_encoder())


def extract(folder, encoder, notes=None):
    notes = [] if notes is None else notes
    features = store.extract(folder, digits(), encoder.recipe, encoder.see, encoder.identity, notes.append)
    rows = np.arange(len(features))
    return {name: column[rows] for name, column in features.columns.items()} | {"labels": features.labels}


def test_stored_features_are_those_of_each_image(mesh, extracted):
    source, rows = digits(), np.array([1436, 0, 207, 208, 209, 1000])
    with mesh():
        encoder = make_encoder()
        images = np.stack([eval_image(source[i][0], encoder.recipe.data, 8) for i in rows])
        expected = see(encoder.model, normalize(place({"x": images})["x"], encoder.recipe.data), encoder.terms)
    for name, x in expected.items():
        np.testing.assert_allclose(extracted[name][rows], np.asarray(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(extracted["labels"], [source[i][1] for i in range(len(source))])


def test_eight_devices_extract_what_one_does(mesh, extracted, tmp_path):
    with mesh(data=8):
        found = extract(tmp_path / "features" / "train", make_encoder())
    for name, x in extracted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_killed_extraction_goes_on_and_equals_an_uninterrupted_one(mesh, extracted, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_ROWS", 208)
    folder = tmp_path / "work" / "features" / "train"
    batches = itertools.count()

    class Killed(Exception):
        pass

    with mesh():
        encoder = make_encoder()
        whole = encoder.see

        def until_killed(images):
            if next(batches) == 30:  # in the third chunk of 13 batches
                raise Killed
            return whole(images)

        with pytest.raises(Killed):
            store.extract(folder, digits(), encoder.recipe, until_killed, encoder.identity, lambda text: None)
        (folder / "pooled-000002-00000.npy").write_bytes(b"half")  # as if killed between the files of a chunk
        notes: list[str] = []
        found = extract(folder, encoder, notes)
        assert notes[0] == "train: goes on at image 416"
        again: list[str] = []
        extract(folder, encoder, again)
        assert again == []  # nothing was left to do
    for name, x in extracted.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_features_of_something_else_are_refused(mesh, tmp_path):
    folder = tmp_path / "work" / "features" / "train"
    with mesh():
        extract(folder, make_encoder())
        with pytest.raises(RecipeError, match=r"features of train have model='\w+', not"):
            extract(folder, make_encoder(model=make_model(seed=5)))
        wide = make_encoder(dataclasses.replace(CONFIG, image_size=16))
        with pytest.raises(RecipeError, match="have image_size=8, not 16"):
            extract(folder, wide)
        encoder = make_encoder()
        with pytest.raises(RecipeError, match=r"have (fingerprint|images)="):
            store.extract(folder, digits("validation"), encoder.recipe, encoder.see, encoder.identity, print)
        file = folder / "pooled-000000-00000.npy"
        whole = file.read_bytes()
        for damaged in (b"", b"half a file", whole[:-9], whole.replace(b"1440", b"1430")):
            file.write_bytes(damaged)
            with pytest.raises(RecipeError, match=f"^{file}: is damaged or missing; remove {folder} to extract again$"):
                extract(folder, make_encoder())
        (folder / "manifest.json").write_text("{")
        with pytest.raises(RecipeError, match="is damaged; remove"):
            extract(folder, make_encoder())


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins, and ends, while the first is at work; each replaces the file as a whole."""
    path, array, save = tmp_path / "pooled-000000-00000.npy", np.arange(1000), np.save

    def interrupted(file, given):
        monkeypatch.setattr(np, "save", save)
        file.write(b"half")
        store._write(path, array)
        file.seek(0)
        save(file, given)

    monkeypatch.setattr(np, "save", interrupted)
    store._write(path, array)
    np.testing.assert_array_equal(np.load(path), array)
    assert list(tmp_path.iterdir()) == [path]


def test_bf16_features_are_the_rounded_ones(mesh, extracted, tmp_path):
    with mesh():
        found = extract(tmp_path / "features" / "train", make_encoder(dataclasses.replace(CONFIG, dtype="bf16")))
    assert found["pooled"].dtype == store.BF16
    np.testing.assert_array_equal(found["pooled"], extracted["pooled"].astype(store.BF16))


def test_a_digest_sees_every_parameter_and_no_sharding(mesh):
    with mesh():
        model = make_model()
        one, host = digest(model), jax.tree.map(np.asarray, model)
        assert digest(make_model(seed=1)) != one
        for index, leaf in enumerate(leaves := jax.tree.leaves(host)):
            changed = leaf.copy()
            changed.flat[[0, -1]] = changed.flat[[-1, 0]]  # the same values in another order
            other = jax.tree.unflatten(jax.tree.structure(host), [*leaves[:index], changed, *leaves[index + 1 :]])
            assert digest(jax.tree.map(jnp.asarray, other)) != one
    with mesh(data=2, model=2):
        spread = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), host, make_model())
        assert digest(spread) == one


# The grid


def random_features(count=70, width=6, classes=4, dtype=np.float32, mean=1):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=count).astype(np.int32)
    centres = rng.normal(size=(classes, width))
    columns = {
        "a": (centres[labels] + rng.normal(size=(count, width)) + mean).astype(dtype),
        "b": rng.normal(size=(count, 3)).astype(dtype),
    }
    return Features(columns, labels, classes)


GRID = dataclasses.replace(
    CONFIG,
    features=("a", "b"),
    learning_rates=(0.1, 1.0),
    weight_decays=(0.0, 0.1),
    epochs=(1, 3),
    batch_size=16,
    seed=3,
)


def train(settings, features, rows, config=GRID):
    names = list(dict.fromkeys(s.feature for s in settings))
    widths = {name: x.shape[1] for name, x in features.columns.items()}
    stream = sgd.stored_batches(features, rows, names, config)
    return sgd.train(settings, stream, widths, features.num_classes, len(rows), config)


def by_numpy(setting, features, rows, config):
    """One head by itself, in fp64, from the same start and in the same order."""
    x, y = np.asarray(features.columns[setting.feature], np.float64), features.labels
    start = jax.random.normal(jax.random.key(config.seed), (x.shape[1], features.num_classes))
    kernel, bias = 0.01 * np.asarray(start, np.float64), np.zeros(features.num_classes)
    velocity = [np.zeros_like(kernel), np.zeros_like(bias)]
    count, steps = config.batch_size, setting.epochs * len(rows) // config.batch_size
    order = np.concatenate([np.random.default_rng((config.seed, e)).permutation(rows) for e in range(setting.epochs)])
    for step in range(steps):
        batch = order[step * count : (step + 1) * count]
        logits = x[batch] @ kernel + bias
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(count), y[batch]] -= 1
        velocity[0] = 0.9 * velocity[0] + x[batch].T @ p / count + setting.weight_decay * kernel
        velocity[1] = 0.9 * velocity[1] + p.mean(axis=0)
        rate = setting.learning_rate * (1 + np.cos(np.pi * step / steps)) / 2
        kernel, bias = kernel - rate * velocity[0], bias - rate * velocity[1]
    return kernel, bias


@pytest.mark.parametrize("devices", [1, 8])
def test_every_head_of_the_grid_is_what_it_would_be_alone(mesh, devices):
    features, rows = random_features(), np.arange(5, 66)  # 61: epochs end within batches
    with mesh(data=devices):
        groups = train(sgd.grid(GRID), features, rows)
        assert [len(group.settings) for group in groups] == [8, 8]
        for group in groups:
            for h, settings in enumerate(group.settings):
                assert settings["steps"] == settings["epochs"] * 61 // 16
                kernel, bias = by_numpy(sgd.setting_of(settings), features, rows, GRID)
                np.testing.assert_allclose(np.asarray(group.kernel[h]), kernel, atol=2e-5)
                np.testing.assert_allclose(np.asarray(group.bias[h]), bias, atol=2e-5)
        setting = sgd.grid(GRID)[3]
        (alone,) = train([setting], features, rows)
        np.testing.assert_allclose(np.asarray(alone.kernel[0]), np.asarray(groups[0].kernel[3]), atol=1e-6)


def test_epochs_are_permutations_without_a_gap():
    rows = np.arange(10, 17)
    taken = np.concatenate(list(itertools.islice(sgd.epochs(rows, 4, seed=1), 7)))
    for epoch in range(4):
        assert sorted(taken[epoch * 7 : (epoch + 1) * 7]) == list(rows)
    assert not np.array_equal(taken[:7], taken[7:14])
    large = next(sgd.epochs(rows, 20, seed=1))
    np.testing.assert_array_equal(large, taken[:20])


def test_augmented_features_are_those_of_the_crops_that_training_would_see(mesh):
    source, rows = digits(), np.arange(3, 50)
    config = dataclasses.replace(CONFIG, augment="crop_flip", batch_size=16, min_area=0.5, seed=4)
    with mesh(data=2):
        encoder = make_encoder(config)
        found = list(itertools.islice(augmented_batches(encoder, source, rows, config), 6))
    recipe = encoder.recipe
    for number, batch in enumerate(found):
        labels = []
        for i in range(16 * number, 16 * (number + 1)):
            image, label = source[rows[data.source_index(i, len(rows), 4)]]
            view = train_image(image, recipe.data, 8, np.random.default_rng((4, i)))
            labels.append(label)
            if i % 16 == 5:
                with mesh():
                    x = normalize(place({"x": view[None]})["x"], recipe.data)
                    expected = see(encoder_on_one_device(encoder), x, encoder.terms)["pooled"]
                np.testing.assert_allclose(
                    np.asarray(batch["pooled"])[5], np.asarray(expected)[0], rtol=1e-4, atol=1e-5
                )
        np.testing.assert_array_equal(np.asarray(batch["label"]), labels)


def encoder_on_one_device(encoder):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), encoder.model)


# Heads


@pytest.mark.parametrize("dtype", [np.float32, store.BF16])
def test_heads_are_measured_as_numpy_does(mesh, dtype):
    """Of bf16 features too: they are around 10, so that kernels rounded to bf16 have another loss by 0.3 %."""
    features, rows = random_features(dtype=dtype, mean=10), np.arange(69, 0, -1)
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(3, 6, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    with mesh(data=8):
        heads = Heads("a", [{}] * 3, jnp.asarray(kernel), jnp.asarray(bias))
        measured = [sums.result() for sums in measure(heads, features, rows)]
        predicted = predict(heads.one(1), features, rows)
    x, y = features.columns["a"][rows].astype(np.float64), features.labels[rows]
    for h, result in enumerate(measured):
        logits = x @ kernel[h] + bias[h]
        assert result["examples"] == 69
        assert result["top1"] == pytest.approx((logits.argmax(axis=1) == y).mean())
        loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(69), y]
        assert result["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    np.testing.assert_allclose(predicted, x @ kernel[1] + bias[1], rtol=1e-4, atol=1e-5)


# Flags


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_valid(name):
    dataclasses.replace(CONFIG, **protocol_fields(name, 1024)).validate()


def test_dinov2s_rates_grow_with_the_batch_as_in_its_code():
    """13 rates from 1e-5 to 0.1 at a batch of 256; of others' rates we know no such rule."""
    for batch_size in (128, 256, 1024):
        rates = protocol_fields("dinov2", batch_size)["learning_rates"]
        assert len(rates) == 13
        assert (rates[0], rates[-1]) == pytest.approx((1e-5 * batch_size / 256, 0.1 * batch_size / 256))
    assert protocol_fields("dinov3", 256) == protocol_fields("dinov3", 1024)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "10,30", (10, 30)),
        ("learning_rates", "1e-3, 2", (0.001, 2.0)),
        ("features", "cls+mean,pooled", ("cls+mean", "pooled")),
        ("refit", "False", False),
        ("holdout", ".2", 0.2),
    ],
)
def test_flags_are_read_as_their_fields_are_typed(name, text, value):
    assert typed(name, text) == value


@pytest.mark.parametrize(("name", "text"), [("epochs", "1.5"), ("refit", "maybe"), ("holdout", "x"), ("seed", "")])
def test_a_flag_of_another_type_is_refused(name, text):
    with pytest.raises(RecipeError, match=f"--{name}={text}: needs"):
        typed(name, text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "--model=''"),
        ({"holdout": 1.0}, "--holdout=1.0"),
        ({"methods": ("svm",)}, "--methods='svm'"),
        ({"epochs": ()}, "--epochs="),
        ({"epochs": (10, 10)}, "has a value twice"),
        ({"learning_rates": (0.0,)}, "--learning_rates="),
        ({"momentum": 1.0}, "--momentum=1.0"),
        ({"c": (1.0, -1.0)}, "--c="),
        ({"tolerance": 0.0}, "--tolerance=0.0"),
        ({"max_iterations": 0}, "--max_iterations=0"),
        ({"select_on": "test"}, "--select_on='test'"),
        ({"approximation": 12.5}, "--approximation=12.5: must be an error"),
        ({"weight_decays": (0.0, float("nan"))}, "--weight_decays="),
        ({"mean": (0.5,)}, "--mean="),
        ({"also": ("a=digits", "b=digits", "a=digits")}, "--also=a: is there twice"),
        ({"methods": ("few_shot",)}, "--methods=few_shot: few_shot alone chooses no settings"),
        ({"methods": ("knn",), "decompose": True}, "--methods=knn: a decomposition needs sgd, logistic or ridge"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(changes, says):
    with pytest.raises(RecipeError, match=says):
        dataclasses.replace(CONFIG, **changes).validate()
