"""The ways of reading a frozen encoder's features that have settings to choose, behind one interface."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np

from vit22b import data
from vit22b.config import Recipe
from vit22b.probing import closed_form, heads, logistic, nearest, sgd
from vit22b.probing.config import ProbeConfig
from vit22b.probing.encoder import Encoder
from vit22b.probing.heads import Heads
from vit22b.probing.rows import Features
from vit22b.probing.scoring import same_classes, score
from vit22b.sources import Source
from vit22b.train import place

FEW_STEPS = 100  # of SGD: fewer are told

Predictor = Callable[[Features, np.ndarray], np.ndarray]  # logits (M, C), fp32, of rows of any set


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings, how good they are on the rows they are judged by, and what was trained with them."""

    settings: dict[str, object]
    metrics: dict[str, float]  # as `ClassificationSums.result`
    predict: Predictor


class Method(Protocol):
    """A way to train; `settings` are a candidate's."""

    def candidates(self, train: Features, rows: np.ndarray, judge: Features, judge_rows: np.ndarray) -> list[Candidate]:
        """Every setting, trained on rows of `train` and measured on rows of `judge`."""
        ...

    def fit(self, settings: dict[str, object], train: Features, rows: np.ndarray) -> Predictor:
        """One setting trained on these rows."""
        ...

    def meaningless(self, settings: dict[str, object]) -> tuple[str, ...]:
        """Metrics that say nothing about its classifiers with these settings."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearPredictor:
    """A `Predictor`; its head can be kept."""

    head: Heads

    def __call__(self, features: Features, rows: np.ndarray) -> np.ndarray:
        return heads.predict(self.head, features, rows)


class Linear:
    """A method that gives heads: `train(settings or None for all, features, rows)`."""

    def __init__(
        self,
        train: Callable[[dict[str, object] | None, Features, np.ndarray], list[Heads]],
        meaningless: tuple[str, ...] = (),
    ) -> None:
        self._train, self._meaningless = train, meaningless

    def candidates(self, train: Features, rows: np.ndarray, judge: Features, judge_rows: np.ndarray) -> list[Candidate]:
        found = []
        for group in self._train(None, train, rows):
            measured = heads.measure(group, judge, judge_rows)
            for index, (settings, sums) in enumerate(zip(group.settings, measured, strict=True)):
                found.append(Candidate(settings, sums.result(), LinearPredictor(group.one(index))))
        return found

    def fit(self, settings: dict[str, object], train: Features, rows: np.ndarray) -> LinearPredictor:
        (group,) = self._train(settings, train, rows)
        return LinearPredictor(group)

    def meaningless(self, settings: dict[str, object]) -> tuple[str, ...]:
        return self._meaningless


class Nearest:
    """Weighted nearest neighbours, which train nothing."""

    def __init__(self, config: ProbeConfig) -> None:
        self._config = config

    def candidates(self, train: Features, rows: np.ndarray, judge: Features, judge_rows: np.ndarray) -> list[Candidate]:
        found = []
        for feature in self._config.features:
            votes = self._votes(feature, self._config.neighbours, train, rows, judge, judge_rows)
            for neighbours, logits in zip(self._config.neighbours, votes, strict=True):
                settings: dict[str, object] = {"feature": feature, "neighbours": neighbours}
                judged = score(logits, judge.labels[judge_rows], same_classes(judge.num_classes))
                found.append(Candidate(settings, judged.metrics, self.fit(settings, train, rows)))
        return found

    def fit(self, settings: dict[str, object], train: Features, rows: np.ndarray) -> Predictor:
        feature, neighbours = str(settings["feature"]), int(str(settings["neighbours"]))
        return lambda features, asked: self._votes(feature, (neighbours,), train, rows, features, asked)[0]

    def meaningless(self, settings: dict[str, object]) -> tuple[str, ...]:
        # Fewer neighbours than 5 vote for fewer classes than 5, and most classes have no share at all.
        return ("top5", "loss") if int(str(settings["neighbours"])) < 5 else ()

    def _votes(self, feature, neighbours, train, rows, judge, judge_rows) -> np.ndarray:
        """Logarithms of the classes' shares of the votes, (K, M, C); -inf of a class without."""
        shares = nearest.votes(train, feature, rows, judge, judge_rows, neighbours, self._config.temperature)
        with np.errstate(divide="ignore"):
            return np.log(shares)


def methods(
    config: ProbeConfig, encoder: Encoder, source: Source, count: int, remark: Callable[[str], None]
) -> dict[str, Method]:
    """Those of the flags, by name; `source` has the training images, for features that are not stored.

    Settings are tried on `count` images. `remark` gets what is to be told beside the figures.
    """
    steps = sgd.num_steps(min(config.epochs), count, config.batch_size)
    if "sgd" in config.methods and steps < FEW_STEPS:
        remark(
            f"sgd: few steps, {steps} at --epochs={min(config.epochs)} and --batch_size={config.batch_size} "
            f"on {count:,} images; more epochs or a smaller batch make more"
        )

    def train_sgd(settings: dict[str, object] | None, features: Features, rows: np.ndarray) -> list[Heads]:
        grid = sgd.grid(config) if settings is None else [sgd.setting_of(settings)]
        names = list(dict.fromkeys(setting.feature for setting in grid))
        stream = (
            augmented_batches(encoder, source, rows, config)
            if config.augment == "crop_flip"
            else sgd.stored_batches(features, rows, names, config)
        )
        return sgd.train(grid, stream, encoder.widths, features.num_classes, len(rows), config)

    def train_logistic(settings: dict[str, object] | None, features: Features, rows: np.ndarray) -> list[Heads]:
        found = []
        for feature, values in chosen(settings, "c", config.features, config.c):
            fitted, iterations, derivatives = logistic.fit(
                features, feature, rows, values, config.tolerance, config.max_iterations
            )
            early = np.sum(derivatives > config.tolerance)
            if early:
                remark(
                    f"logistic: {early} of {len(values)} heads of {feature} not at --tolerance={config.tolerance:g}: "
                    f"derivatives of up to {derivatives.max():.1g}, {iterations.max()} iterations at most"
                )
            found.append(fitted)
        return found

    def train_ridge(settings: dict[str, object] | None, features: Features, rows: np.ndarray) -> list[Heads]:
        wanted = chosen(settings, "l2", config.features, config.l2)
        return [closed_form.ridge(features, feature, rows, values) for feature, values in wanted]

    known: dict[str, Method] = {
        "sgd": Linear(train_sgd),
        "logistic": Linear(train_logistic),
        # Its outputs are regressed on 1 and -1: as logits, they claim a confidence that nobody fitted.
        "ridge": Linear(train_ridge, meaningless=("loss", "ece")),
        "knn": Nearest(config),
    }
    return {name: known[name] for name in config.methods if name in known}


def chosen(
    settings: dict[str, object] | None, name: str, features: tuple[str, ...], values: tuple[float, ...]
) -> list[tuple[str, tuple[float, ...]]]:
    """The features to train on, each with the values of the setting `name`: all, or those of `settings`."""
    if settings is None:
        return [(feature, values) for feature in features]
    return [(str(settings["feature"]), (float(str(settings[name])),))]


def augmented_batches(
    encoder: Encoder, source: Source, rows: np.ndarray, config: ProbeConfig
) -> Iterator[dict[str, jax.Array]]:
    """Features of random crops and flips of these images, and 'label', without end; the host decodes ahead."""
    images = source.only(rows, rows.tobytes())
    recipe: Recipe = dataclasses.replace(encoder.recipe, batch_size=config.batch_size)
    batches = data.train_batches(images, recipe, 0, jax.process_index(), jax.process_count())
    try:
        for host_batch in batches:
            batch = place(host_batch)
            yield encoder.see(batch["image"]) | {"label": batch["label"]}
    finally:
        batches.close()
