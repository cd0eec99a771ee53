"""Augmentation of one image on the host: from uint8 (H, W, 3) of any size to uint8 (S, S, 3), with S the model's size.

Every function is a function of its arguments alone: what is random comes from `rng`. Resampling is Pillow's bicubic,
which averages over all source pixels when it shrinks (antialias). Normalisation, mixup and CutMix come later, on the
device.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit22b.config import DataConfig

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR
AFFINE = Image.Transform.AFFINE
GREY = (128, 128, 128)  # what RandAugment's rotations, shears and translations uncover


def train_image(image: np.ndarray, config: DataConfig, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """One random training view: crop, flip, augment, erase, each as `config` says; uint8 (S, S, 3)."""
    if config.crop == "inception":
        image = inception_crop(image, image_size, config.min_area, rng)
    elif config.crop == "shift":
        image = shift_crop(resize(image, image_size, image_size), rng)
    else:
        image = resize(image, image_size, image_size)
    if config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if config.augment == "randaugment":
        image = randaugment(image, config.randaugment_layers, config.randaugment_magnitude, rng)
    elif config.augment == "three_augment":
        image = three_augment(image, config.color_jitter, rng)
    if rng.random() < config.random_erasing:
        image = random_erasing(image, rng)
    return image


def eval_image(image: np.ndarray, config: DataConfig, image_size: int) -> np.ndarray:
    """Resized to `image_size / eval_crop_fraction` as `eval_resize` says, then the central square; uint8 (S, S, 3)."""
    height, width = image.shape[:2]
    short = round(image_size / config.eval_crop_fraction)
    if config.eval_resize == "square":
        image = resize(image, short, short)
    else:
        scale = short / min(height, width)
        image = resize(image, max(round(height * scale), short), max(round(width * scale), short))
    top, left = (image.shape[0] - image_size) // 2, (image.shape[1] - image_size) // 2
    return image[top : top + image_size, left : left + image_size]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`image` at another size, regardless of its aspect; itself if it has that size already."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), BICUBIC))


def inception_crop(image: np.ndarray, image_size: int, min_area: float, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle, resized to the square [Szegedy 2015, section 6].

    Its area is uniform in [min_area, 1] of the image's, the logarithm of its aspect in [3/4, 4/3]. What does not fit
    is drawn again, at most 10 times; then it is the largest central rectangle within these aspects. (torchvision's
    rule; TensorFlow's draws the aspect itself uniformly.)
    """
    height, width = image.shape[:2]
    for _ in range(10):
        h, w = _rectangle(height * width, (min_area, 1), (3 / 4, 4 / 3), rng)
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], image_size, image_size)


def _rectangle(
    area: int, fraction: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """(height, width) with a uniform part of `area` and a log-uniform width / height."""
    target = area * rng.uniform(*fraction)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    return round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))


def shift_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Same size, shifted by up to 1/8 of it in x and y, black where uncovered: 4 of 32 pixels [He 2016, sec. 4.2]."""
    height, width = image.shape[:2]
    pad_y, pad_x = height // 8, width // 8
    padded = np.zeros((height + 2 * pad_y, width + 2 * pad_x, 3), np.uint8)  # np.pad takes ten times as long
    padded[pad_y : pad_y + height, pad_x : pad_x + width] = image
    top, left = rng.integers(2 * pad_y + 1), rng.integers(2 * pad_x + 1)
    return padded[top : top + height, left : left + width]


# RandAugment. An operation gets a strength s in [0, 1] or, where there are two directions, in [-1, 1]; 0 changes
# nothing, 1 is the end of the range in [Cubuk 2019, AutoAugment, Table 6], for solarize_add 110 as in timm.

STRONG_OPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),  # no strength
    "equalize": lambda image, s: ImageOps.equalize(image),  # no strength
    "invert": lambda image, s: ImageOps.invert(image),  # no strength
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * s)),  # 8 to 4 bits
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - round(256 * s)),  # inverts from 256 .. 0 up
    "solarize_add": lambda image, s: image.point([x + round(110 * s) if x < 128 else x for x in range(256)] * 3),
}
SIGNED_OPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),  # 0.1 to 1.9, as the next three
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "rotate": lambda image, s: image.rotate(30 * s, BILINEAR, fillcolor=GREY),  # degrees
    "shear_x": lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, 150 / 331 * s * image.width, 0, 1, 0)),  # 150 of 331 pixels
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, 150 / 331 * s * image.height)),
}


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, AFFINE, coefficients, BILINEAR, fillcolor=GREY)


def randaugment(image: np.ndarray, layers: int, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """`layers` operations, each drawn from the 15 with equal chance, of strength `magnitude` / 30 [Cubuk 2020].

    The 15 are timm's: the paper's without the identity, with invert and solarize_add (big_vision adds Cutout). There
    magnitudes have a range of 10, so that m is 3 m here. As in the paper and unlike timm, every drawn operation is
    applied, and with the same strength.
    """
    picture = Image.fromarray(image)
    names = (*STRONG_OPS, *SIGNED_OPS)
    for choice in rng.integers(len(names), size=layers):
        name, strength, sign = names[choice], magnitude / 30, rng.choice((-1, 1))
        if name in SIGNED_OPS:
            picture = SIGNED_OPS[name](picture, sign * strength)
        else:
            picture = STRONG_OPS[name](picture, strength)
    return np.asarray(picture)


def three_augment(image: np.ndarray, color_jitter: float, rng: np.random.Generator) -> np.ndarray:
    """Grey, solarized or blurred with equal chance, then colour jitter [Touvron 2022, DeiT III, section 3].

    Solarization inverts from 128 up and the blur's radius is 0.1 to 2 pixels, as in the authors' code. The jitter
    scales brightness, contrast and saturation in random order, each by a factor in 1 -+ `color_jitter`.
    """
    picture = Image.fromarray(image)
    match rng.integers(3):
        case 0:
            picture = picture.convert("L").convert("RGB")
        case 1:
            picture = ImageOps.solarize(picture, 128)
        case _:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for choice in rng.permutation(3):
        factor = rng.uniform(max(0, 1 - color_jitter), 1 + color_jitter)
        picture = enhancers[choice](picture).enhance(factor)
    return np.asarray(picture)


def random_erasing(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle replaced by noise, uniform per pixel and channel [Zhong 2020, Algorithm 1].

    Its area is uniform in 0.02 .. 0.33 of the image's, its aspect log-uniform in 0.3 .. 1 / 0.3. What does not fit is
    drawn again, at most 10 times; then the image stays as it is.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        h, w = _rectangle(height * width, (0.02, 0.33), (0.3, 1 / 0.3), rng)
        if h <= height and w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()
            image[top : top + h, left : left + w] = rng.integers(256, size=(h, w, 3), dtype=np.uint8)
            break
    return image
