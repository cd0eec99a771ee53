"""Augmentation, each against an independent value: plain NumPy, plain Pillow, or the distribution it should have."""

import math

import numpy as np
import pytest
from PIL import Image

from vit22b import augment
from vit22b.config import DataConfig


def config(**overrides):
    return DataConfig(train="digits", validation="digits", **overrides)


def photo(height=90, width=120, seed=0):
    """Smooth colours with some noise, so that resampling and colour operations behave as on photographs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    base = np.stack([np.sin(3 * x + y), np.cos(4 * y), np.sin(5 * x * y)], axis=-1) * 90 + 128
    return np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)


def coordinates(height, width):
    """Every pixel tells where it is: red its row, green its column."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y, x, np.zeros_like(y)], axis=-1).astype(np.uint8)


def crop_rectangles(monkeypatch, height, width, min_area, count):
    """(top, left, height, width) of what `inception_crop` cuts out, `count` times."""
    cut = []
    monkeypatch.setattr(augment, "resize", lambda image, h, w: cut.append(image) or image)
    for seed in range(count):
        augment.inception_crop(coordinates(height, width), 16, min_area, np.random.default_rng(seed))
    return np.array([(*image[0, 0, :2], *image.shape[:2]) for image in cut]).astype(int)


def test_inception_crop_areas_are_uniform_and_aspects_log_uniform(monkeypatch):
    top, left, height, width = crop_rectangles(monkeypatch, 200, 200, 0.05, 3000).T
    area = height * width / 200**2
    aspect = np.log(width / height)
    assert area.min() > 0.05 - 0.005 and area.max() <= 1  # rounding to pixels moves the least area by under 1/10
    assert np.abs(aspect).max() < math.log(4 / 3) + 0.05
    # Rectangles that stick out are drawn again, hence only below the area where none can (3/4) the law is exact.
    small = np.sort(area[area < 0.7])
    uniform = np.linspace(small[0], small[-1], len(small))
    assert np.abs(small - uniform).max() < 0.03  # Kolmogorov-Smirnov at n = 2200: 0.029 / 0.65 at 1 %
    assert abs(aspect[area < 0.7].mean()) < 0.02 and abs(aspect[area < 0.7].std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    assert (top + height <= 200).all() and (left + width <= 200).all()


def test_inception_crops_reach_every_pixel(monkeypatch):
    covered = np.zeros((40, 60), int)
    for top, left, height, width in crop_rectangles(monkeypatch, 40, 60, 0.05, 500):
        covered[top : top + height, left : left + width] += 1
    assert covered.min() > 0


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (10, 13)), (100, 10, (13, 10))])
def test_inception_crop_falls_back_to_the_centre_of_long_images(monkeypatch, height, width, expected):
    for top, left, h, w in crop_rectangles(monkeypatch, height, width, 0.9, 5):  # 0.9 of such an image never fits
        assert (h, w) == expected
        assert (top, left) == ((height - h) // 2, (width - w) // 2)


def test_inception_crop_resamples_like_pillow():
    image = photo()
    top, left, height, width = 0, 0, 90, 120
    result = augment.resize(image, 32, 32)
    expected = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((32, 32), Image.BICUBIC)
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_shift_crops_are_all_81_shifts_of_an_8_by_8_padded_by_black():
    image = photo(64, 64)
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)))
    possible = {padded[y : y + 64, x : x + 64].tobytes() for y in range(17) for x in range(17)}
    seen = {augment.shift_crop(image, np.random.default_rng(seed)).tobytes() for seed in range(3000)}
    assert seen == possible  # 289 shifts; one is missed with probability 289 * e^(-3000 / 289) < 1 %


def test_resizing_to_the_same_size_is_the_identity():
    image = photo(8, 8)
    for crop in ("resize", "shift"):
        result = augment.train_image(image, config(crop=crop, flip=False), 8, np.random.default_rng(0))
        assert crop == "shift" or result is image
    assert augment.eval_image(image, config(eval_crop_fraction=1), 8).tobytes() == image.tobytes()


def test_flip_mirrors_half_of_the_images_and_keeps_the_others():
    image = photo(16, 16)
    results = [augment.train_image(image, config(crop="resize"), 16, np.random.default_rng(i)) for i in range(400)]
    flipped = sum(np.array_equal(r, np.fliplr(image)) for r in results)
    kept = sum(np.array_equal(r, image) for r in results)
    assert flipped + kept == 400
    assert abs(flipped - 200) < 4 * math.sqrt(100)  # 4 standard deviations


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (224, 224), (100, 101), (30, 900)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_crop_equals_pillows(height, width, fraction):
    image = photo(height, width)
    short = int(0.5 + 64 / fraction)
    if height < width:
        size = (int(0.5 + width * short / height), short)
    else:
        size = (short, int(0.5 + height * short / width))
    picture = Image.fromarray(image).resize(size, Image.BICUBIC)
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    expected = np.asarray(picture.crop((left, top, left + 64, top + 64)))
    result = augment.eval_image(image, config(eval_crop_fraction=fraction), 64)
    np.testing.assert_array_equal(result, expected)


UNCHANGED_BY_MAGNITUDE = ("autocontrast", "equalize", "invert")


@pytest.mark.parametrize("name", [*augment.STRONG_OPS, *augment.SIGNED_OPS])
def test_randaugment_operation_of_strength_0_is_the_identity(name):
    image = photo()
    operation = (augment.STRONG_OPS | augment.SIGNED_OPS)[name]
    result = np.asarray(operation(Image.fromarray(image), 0.0))
    if name in UNCHANGED_BY_MAGNITUDE:
        assert not np.array_equal(result, image)
    else:
        np.testing.assert_array_equal(result, image)


def test_randaugment_operations_at_full_strength_have_the_ranges_of_autoaugment():
    image = photo()
    picture = Image.fromarray(image)
    wide = image.astype(int)

    def strong(name, s=1.0):
        return np.asarray(augment.STRONG_OPS[name](picture, s)).astype(int)

    def signed(name, s=1.0):
        return np.asarray(augment.SIGNED_OPS[name](picture, s)).astype(int)

    np.testing.assert_array_equal(strong("invert"), 255 - wide)
    np.testing.assert_array_equal(strong("posterize"), wide // 16 * 16)  # 4 bits
    np.testing.assert_array_equal(strong("solarize"), 255 - wide)  # from 0 up
    np.testing.assert_array_equal(strong("solarize", 0.5), np.where(wide < 128, wide, 255 - wide))
    np.testing.assert_array_equal(strong("solarize_add"), np.where(wide < 128, wide + 110, wide))
    np.testing.assert_allclose(signed("brightness"), np.clip(wide * 1.9, 0, 255), atol=1)
    np.testing.assert_allclose(signed("brightness", -1.0), wide * 0.1, atol=1)
    grey = np.asarray(picture.convert("L")).astype(int)
    np.testing.assert_allclose(signed("color", -1.0), wide * 0.1 + grey[..., None] * 0.9, atol=1)
    np.testing.assert_allclose(signed("contrast", -1.0), wide * 0.1 + grey.mean() * 0.9, atol=1.5)
    shift = 120 * 150 / 331
    moved = signed("translate_x")[:, : 120 - math.ceil(shift)]
    low, high = wide[:, math.floor(shift) : -1], wide[:, math.ceil(shift) :]
    expected = low + (high - low[:, : high.shape[1]]) * (shift % 1) if low.shape == high.shape else low[:, :-1]
    assert np.abs(moved - expected[:, : moved.shape[1]]).mean() < 6  # up to the noise that interpolation smooths
    assert (signed("translate_x")[:, 121 - math.floor(shift) :] == 128).all()  # uncovered
    np.testing.assert_array_equal(signed("rotate", 0.5), np.asarray(picture.rotate(15, 2, fillcolor=(128,) * 3)))
    sheared = signed("shear_x")
    for row in (10, 50):  # row y takes its pixels from 0.3 y further right
        source = np.arange(80) + 0.3 * (row + 0.5)
        expected = np.stack([np.interp(source, np.arange(120), wide[row, :, c]) for c in range(3)], axis=-1)
        assert np.abs(sheared[row, :80] - expected).mean() < 3


def test_opposite_signs_of_randaugments_moves_undo_each_other_inside():
    image = photo(120, 120).astype(int)
    smooth = Image.fromarray(image.astype(np.uint8)).resize((30, 30)).resize((120, 120), Image.BICUBIC)
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        operation = augment.SIGNED_OPS[name]
        back = operation(operation(smooth, 0.3), -0.3)
        inside = (np.asarray(back).astype(int) - np.asarray(smooth))[45:75, 45:75]
        assert np.abs(inside).mean() < 1.5, name


def test_randaugment_draws_every_operation_equally_often(monkeypatch):
    drawn = []

    def record(name):
        return lambda image, s: drawn.append((name, s)) or image

    for table in ("STRONG_OPS", "SIGNED_OPS"):
        monkeypatch.setattr(augment, table, {name: record(name) for name in getattr(augment, table)})
    for seed in range(1500):
        augment.randaugment(photo(4, 4), 2, 10, np.random.default_rng(seed))
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert len(names) == 15 and counts.sum() == 3000
    assert np.abs(counts - 200).max() < 5 * math.sqrt(200)
    strengths = {(name in augment.SIGNED_OPS, round(s, 6)) for name, s in drawn}
    assert strengths == {(False, 0.333333), (True, 0.333333), (True, -0.333333)}


def test_three_augment_without_jitter_is_grey_solarized_or_blurred_in_equal_parts():
    image = photo(32, 32)
    picture = Image.fromarray(image)
    grey = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=2)
    solarized = np.where(image < 128, image, 255 - image)
    counts = {"grey": 0, "solarized": 0, "blurred": 0}
    for seed in range(600):
        result = augment.three_augment(image, 0.0, np.random.default_rng(seed))
        if np.array_equal(result, grey):
            counts["grey"] += 1
        elif np.array_equal(result, solarized):
            counts["solarized"] += 1
        else:
            assert result.astype(int).std() <= image.astype(int).std()
            counts["blurred"] += 1
    assert all(abs(n - 200) < 4 * math.sqrt(600 * 2 / 9) for n in counts.values())


def test_color_jitter_scales_the_brightness_within_its_range():
    white = np.full((8, 8, 3), 100, np.uint8)  # grey: contrast and saturation leave it, solarization and blur too
    means = [augment.three_augment(white, 0.3, np.random.default_rng(seed)).mean() for seed in range(500)]
    assert 69 <= min(means) < 75 and 125 < max(means) <= 131


def test_random_erasing_replaces_one_rectangle_by_uniform_noise():
    areas, noise = [], []
    blank = np.zeros((100, 100, 3), np.uint8)
    for seed in range(800):
        result = augment.random_erasing(blank, np.random.default_rng(seed))
        rows, columns = np.nonzero(result.any(axis=(1, 2)))[0], np.nonzero(result.any(axis=(0, 2)))[0]
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        inside = result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.any(axis=2).mean() > 0.999  # noise is black with probability 2^-24
        areas.append(height * width / 10_000)
        noise.append(inside.mean())
        assert 0.27 < width / height < 3.6
    assert not blank.any()
    assert min(areas) > 0.017 and max(areas) < 0.34
    assert abs(np.mean(areas) - (0.02 + 0.33) / 2) < 0.015
    assert abs(np.mean(noise) - 127.5) < 1


def test_random_erasing_happens_with_its_probability():
    image = photo(16, 16)
    plain = config(crop="resize", flip=False, random_erasing=0.25)
    results = [augment.train_image(image, plain, 16, np.random.default_rng(i)) for i in range(800)]
    erased = sum(not np.array_equal(result, image) for result in results)
    assert abs(erased - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)


@pytest.mark.parametrize("size", [8, 48])
@pytest.mark.parametrize("crop", ["inception", "resize", "shift"])
@pytest.mark.parametrize("kind", ["none", "randaugment", "three_augment"])
def test_any_input_becomes_a_square_of_bytes_that_depends_on_the_generator_alone(crop, kind, size):
    settings = config(crop=crop, augment=kind, randaugment_magnitude=30, random_erasing=0.5)
    for height, width in ((1, 1), (8, 8), (7, 200), (200, 7), (48, 48), (90, 120)):
        image = photo(height, width)
        before = image.copy()
        for seed in range(4):
            a, b = (augment.train_image(image, settings, size, np.random.default_rng(seed)) for _ in range(2))
            assert a.shape == (size, size, 3) and a.dtype == np.uint8
            np.testing.assert_array_equal(a, b)
        evaluated = augment.eval_image(image, settings, size)
        assert evaluated.shape == (size, size, 3) and evaluated.dtype == np.uint8
        np.testing.assert_array_equal(image, before)
