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
    assert area.min() > 0.05 - 0.005
    assert area.max() <= 1
    assert np.abs(aspect).max() < math.log(4 / 3) + 0.05
    # Up to 3/4 every rectangle fits; above, some stick out and are drawn again, so that the law holds only below.
    below = area < 0.7
    uniform = (np.sort(area[below]) - 0.05) / (0.7 - 0.05)
    steps = np.arange(below.sum()) / below.sum()
    assert np.abs(uniform - steps).max() < 1.63 / math.sqrt(below.sum())  # Kolmogorov-Smirnov at 1 %
    assert abs(aspect[below].mean()) < 0.02
    assert abs(aspect[below].std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    assert (top + height <= 200).all()
    assert (left + width <= 200).all()


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


def test_inception_crop_is_pillows_crop_and_bicubic_resize(monkeypatch):
    image = photo(40, 60)
    result = augment.inception_crop(image, 16, 0.05, np.random.default_rng(7))
    cut = []
    monkeypatch.setattr(augment, "resize", lambda image, h, w: cut.append(image) or image)
    augment.inception_crop(coordinates(40, 60), 16, 0.05, np.random.default_rng(7))
    (top, left, _), (bottom, right, _) = cut[0][0, 0].tolist(), cut[0][-1, -1].tolist()
    expected = Image.fromarray(image).crop((left, top, right + 1, bottom + 1)).resize((16, 16), Image.BICUBIC)
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_shift_crops_are_all_shifts_by_up_to_an_eighth_over_black():
    image = photo(64, 64)
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)))
    possible = {padded[y : y + 64, x : x + 64].tobytes() for y in range(17) for x in range(17)}
    seen = {augment.shift_crop(image, np.random.default_rng(seed)).tobytes() for seed in range(3000)}
    assert seen == possible  # 289 shifts; one is missed with probability 289 * e^(-3000 / 289) < 1 %


def test_resizing_to_the_same_size_is_the_identity():
    image = photo(8, 8)
    assert augment.train_image(image, config(crop="resize", flip=False), 8, np.random.default_rng(0)) is image
    assert augment.eval_image(image, config(eval_crop_fraction=1), 8).tobytes() == image.tobytes()


def test_flip_mirrors_half_of_the_images_and_keeps_the_others():
    image = photo(16, 16)
    results = [augment.train_image(image, config(crop="resize"), 16, np.random.default_rng(i)) for i in range(400)]
    flipped = sum(np.array_equal(r, np.fliplr(image)) for r in results)
    kept = sum(np.array_equal(r, image) for r in results)
    assert flipped + kept == 400
    assert abs(flipped - 200) < 4 * math.sqrt(100)  # 4 standard deviations


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (224, 224), (100, 101), (30, 900)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_crop_equals_pillows(height, width, fraction):
    image = photo(height, width)
    short = int(0.5 + 64 / fraction)
    scale = short / min(height, width)
    size = (int(0.5 + width * scale), int(0.5 + height * scale))
    picture = Image.fromarray(image).resize(size, Image.BICUBIC)
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    expected = np.asarray(picture.crop((left, top, left + 64, top + 64)))
    result = augment.eval_image(image, config(eval_crop_fraction=fraction), 64)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_of_squares_keeps_no_aspect(fraction):
    """All of a wide image, squeezed, of which the border is cut off."""
    image, side = photo(30, 90), round(64 / fraction)
    border = (side - 64) // 2
    squeezed = np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC))
    expected = squeezed[border : border + 64, border : border + 64]
    result = augment.eval_image(image, config(eval_crop_fraction=fraction, eval_resize="square"), 64)
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
    np.testing.assert_array_equal(signed("rotate", 0.5), np.asarray(picture.rotate(15, 2, fillcolor=(128,) * 3)))

    def row_at(row, columns):
        """Row `row` of the image, linearly interpolated at fractional columns."""
        return np.stack([np.interp(columns, np.arange(120), wide[row, :, c]) for c in range(3)], axis=-1)

    shift = 120 * 150 / 331
    moved, sheared = signed("translate_x"), signed("shear_x")
    for row in (0, 40, 89):
        np.testing.assert_allclose(moved[row, :60], row_at(row, np.arange(60) + shift), atol=1)
        # Pixels' centres lie at + 0.5.
        np.testing.assert_allclose(sheared[row, :80], row_at(row, np.arange(80) + 0.3 * (row + 0.5)), atol=1)
    assert (moved[:, 121 - math.floor(shift) :] == 128).all()  # uncovered


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
    assert len(names) == 15
    assert counts.sum() == 3000
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
    assert 69 <= min(means) < 75
    assert 125 < max(means) <= 131


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
    assert min(areas) > 0.017
    assert max(areas) < 0.34
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
            assert a.shape == (size, size, 3)
            assert a.dtype == np.uint8
            np.testing.assert_array_equal(a, b)
        evaluated = augment.eval_image(image, settings, size)
        assert evaluated.shape == (size, size, 3)
        assert evaluated.dtype == np.uint8
        np.testing.assert_array_equal(image, before)
