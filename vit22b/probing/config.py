"""What a probe is asked to do: every flag of launch/probe.py with its default, and the published protocols."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from vit22b.errors import RecipeError, check, check_choice

METHODS = ("sgd", "logistic", "ridge", "knn", "few_shot")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Fields are flags, `--learning_rates=0.01,0.1`. Where there are several values, all combinations are tried."""

    model: str  # the encoder: a work directory, or hf:, timm:, npz: as in launch/convert.py
    train: str  # a source of labelled images, as in a recipe's data.train
    val: str  # the reported set, as in data.validation
    workdir: str = ""  # of features and results; '': runs/probe-MODEL
    protocol: str = "sweep"  # sets the defaults of what follows: one of PROTOCOLS

    # The encoder's features.
    features: tuple[str, ...] = ("pooled",)  # see vit22b/probing/features.py
    image_size: int = 0  # pixels a side; 0: the encoder's own
    # How images are made, as in a recipe's data section; (), 0 and '': as the model's recipe or files say.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    eval_crop_fraction: float = 0.0
    eval_resize: str = ""
    dtype: str = "bf16"  # of matmuls and of stored features: 'bf16', 'fp32'
    extract_batch_size: int = 256
    workers: int = 0  # decoding processes; 0: threads of this one
    threads: int = 8  # decoding threads per process

    methods: tuple[str, ...] = ("sgd", "ridge", "knn", "few_shot")
    seed: int = 0
    holdout: float = 0.1  # part of the training set on which settings are chosen
    select_on: str = "holdout"  # 'val' chooses on the reported set, as some papers did: an optimistic figure
    refit: bool = True  # trains the chosen settings once more on the whole training set

    # 'sgd': softmax regression by SGD with momentum and a cosine to 0, without warm-up.
    learning_rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-5, 1e-4)  # L2, added to the kernel's gradient
    epochs: tuple[int, ...] = (10, 30)
    batch_size: int = 1024
    momentum: float = 0.9
    augment: str = "none"  # 'crop_flip': new random crops and flips in each epoch, whose features are not stored
    min_area: float = 0.08  # of a random crop, as part of the image

    c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)  # 'logistic': scikit-learn's inverse penalty
    tolerance: float = 1e-7  # of the derivatives at its end
    max_iterations: int = 1000
    l2: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)  # 'ridge': scikit-learn's alpha
    neighbours: tuple[int, ...] = (1, 5, 10, 20, 100)  # 'knn'
    temperature: float = 0.07
    shots: tuple[int, ...] = (1, 5, 10, 25)  # 'few_shot': training images of each class
    shot_seeds: int = 3

    also: tuple[str, ...] = ()  # more sets to report: NAME=SOURCE[,labels=FILE|,classes=FILE]
    decompose: bool = False  # splits the error as Dubois et al. 2023 do
    approximation: float = math.nan  # for that: the training error of a supervised model of this architecture, if known

    def validate(self) -> None:
        """Raises `RecipeError` for the first flag that cannot work."""
        for name in ("model", "train", "val"):
            example = {"model": "runs/mine", "train": "tfds:imagenet2012", "val": "folder:/data/val"}[name]
            check(bool(getattr(self, name)), f"--{name}", "''", f"give it, as in --{name} {example}")
        check_choice("--dtype", self.dtype, ("bf16", "fp32"))
        check_choice("--augment", self.augment, ("none", "crop_flip"))
        check_choice("--select_on", self.select_on, ("holdout", "val"))
        for method in self.methods:
            check_choice("--methods", method, METHODS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("also", "mean", "std") and isinstance(value, tuple):
                check(bool(value), f"--{field.name}", "''", "needs at least one value")
                check(len(set(value)) == len(value), f"--{field.name}", value, "has a value twice")
        names = [text.partition("=")[0] for text in self.also]
        twice = next((name for name in names if names.count(name) > 1), None)
        check(twice is None, "--also", twice, "is there twice; give each set a name of its own")
        remedy = "few_shot alone chooses no settings; add another method"
        check(set(self.methods) != {"few_shot"}, "--methods", "few_shot", remedy)
        ok = not self.decompose or bool({"sgd", "logistic", "ridge"} & set(self.methods))
        check(ok, "--methods", ",".join(self.methods), "a decomposition needs sgd, logistic or ridge")
        for name in ("extract_batch_size", "threads", "batch_size", "max_iterations", "shot_seeds"):
            check(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "must be at least 1")
        for name in ("learning_rates", "epochs", "c", "l2", "neighbours", "shots"):
            ok = all(0 < value < math.inf for value in getattr(self, name))
            check(ok, f"--{name}", getattr(self, name), "must be positive")
        ok = all(0 <= value < math.inf for value in self.weight_decays)
        check(ok, "--weight_decays", self.weight_decays, "must be 0 (off) or positive")
        for name in ("mean", "std"):
            check(len(getattr(self, name)) in (0, 3), f"--{name}", getattr(self, name), "needs three numbers")
        for name in ("workers", "image_size", "seed"):
            check(getattr(self, name) >= 0, f"--{name}", getattr(self, name), "must not be negative")
        check(self.tolerance > 0, "--tolerance", self.tolerance, "must be positive")
        check(self.temperature > 0, "--temperature", self.temperature, "must be positive")
        check(0 <= self.momentum < 1, "--momentum", self.momentum, "must be in [0, 1)")
        check(0 < self.min_area <= 1, "--min_area", self.min_area, "must be in (0, 1]")
        ok = math.isnan(self.approximation) or 0 <= self.approximation <= 1
        check(ok, "--approximation", self.approximation, "must be an error in [0, 1]")
        check(0 < self.holdout < 1, "--holdout", self.holdout, "must be between 0 and 1")


FEATURES_OF_DINOV2 = ("cls", "cls@last4", "cls+mean", "cls@last4+mean")
RATES_OF_DINOV2 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at a batch of 256
RATES_OF_DINOV3 = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# What each changes in the defaults above.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # Ours: features extracted once, so that minutes suffice for a large grid.
    "sweep": {},
    # [Dehghani 2023]: SGD with momentum, 10 epochs, mild crops and flips, no regularisation. Its learning rates and how
    # mild the crops are we do not know: both are our choice.
    "vit22b": {
        "methods": ("sgd",),
        "augment": "crop_flip",
        "min_area": 0.25,
        "epochs": (10,),
        "weight_decays": (0.0,),
    },
    # [Oquab 2023] and the authors' code: their 13 rates, which grow with the batch (`protocol_fields`).
    "dinov2": {
        "methods": ("sgd",),
        "augment": "crop_flip",
        "features": FEATURES_OF_DINOV2,
        "epochs": (10,),
        "weight_decays": (0.0,),
    },
    # [Simeoni 2025]: class token after the final norm, 15 rates, two decays.
    "dinov3": {
        "methods": ("sgd",),
        "augment": "crop_flip",
        "features": ("cls",),
        "epochs": (10,),
        "learning_rates": RATES_OF_DINOV3,
        "weight_decays": (0.0, 1e-5),
    },
    # scikit-learn's multinomial logistic regression, with the 45 penalties of [Oquab 2023]'s authors' code.
    "logistic": {
        "methods": ("logistic",),
        "dtype": "fp32",
        "c": tuple(float(f"{10 ** (-6 + 11 * i / 44):.4g}") for i in range(45)),
    },
}


def protocol_fields(name: str, batch_size: int) -> dict[str, Any]:
    """The fields that a protocol sets for this batch size; raises `RecipeError` naming the protocols there are."""
    check_choice("--protocol", name, tuple(PROTOCOLS))
    fields = PROTOCOLS[name] | {"protocol": name}
    if name == "dinov2":
        fields["learning_rates"] = tuple(rate * batch_size / 256 for rate in RATES_OF_DINOV2)
    return fields


def typed(name: str, text: str) -> Any:
    """The value of a flag of `ProbeConfig` from the command line; raises `RecipeError`."""
    kind = next(field.type for field in dataclasses.fields(ProbeConfig) if field.name == name)
    read, needed = _READERS[kind]
    try:
        if kind in (str, int, float, bool):
            return read(text)
        return tuple(read(part.strip()) for part in text.split(",") if part.strip())
    except (ValueError, KeyError) as error:
        raise RecipeError(f"--{name}={text}: needs {needed}") from error


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "a text"),
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    tuple[str, ...]: (str, "texts, as 'a,b'"),
    tuple[int, ...]: (int, "integers, as '1,5'"),
    tuple[float, ...]: (float, "numbers, as '0.1,1'"),
}
