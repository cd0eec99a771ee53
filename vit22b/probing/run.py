"""A whole probe: features, the search for settings, and what is reported of the winners."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from vit22b.data import check_alike
from vit22b.errors import RecipeError, check
from vit22b.probing import closed_form, decompose, heads
from vit22b.probing.config import ProbeConfig
from vit22b.probing.encoder import Encoder
from vit22b.probing.heads import Heads
from vit22b.probing.methods import Linear, LinearPredictor, Method, Predictor, methods
from vit22b.probing.page import write_page
from vit22b.probing.result import (
    FewShot,
    FurtherSet,
    ImageSet,
    MethodResult,
    ProbeResult,
    Trial,
    reported,
    table,
    to_json,
)
from vit22b.probing.rows import Features
from vit22b.probing.scoring import Answers, confusion, read_answers, same_classes, score
from vit22b.probing.store import extract
from vit22b.sources import Source, open_source
from vit22b.workdir import write_json


@dataclasses.dataclass(frozen=True)
class FurtherSource:
    """A set of --also."""

    name: str
    source: Source
    answers: Answers


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start


def probe(encoder: Encoder, config: ProbeConfig, workdir: Path) -> ProbeResult:
    """Runs a probe on the mesh in force and writes its results into `workdir`; raises `RecipeError`.

    Everything the flags can be wrong about is checked before the first image is read.
    """
    train_source, val_source = open_sources(config, encoder)
    num_classes = max(train_source.num_classes, val_source.num_classes)
    further = [read_further(text, encoder, num_classes) for text in config.also]
    known = methods(config, encoder, train_source, note)
    check(bool(known), "--methods", config.methods, "few_shot alone chooses no settings; add another method")
    linear = any(isinstance(method, Linear) for method in known.values())
    check(linear or not config.decompose, "--methods", config.methods, "a decomposition needs sgd, logistic or ridge")
    clock = Clock()
    kept = workdir / "features" / features_folder(encoder)

    def extracted(name: str, source: Source) -> Features:
        with clock.phase("extraction"):
            found = extract(kept / name, source, encoder.recipe, encoder.see, encoder.identity, note)
        return dataclasses.replace(found, num_classes=num_classes)

    train, val = extracted("train", train_source), extracted("val", val_source)
    others = {each.name: extracted(f"also-{each.name}", each.source) for each in further}

    everything = np.arange(len(train))
    fit_rows, judge, judge_rows = everything, val, np.arange(len(val))
    if config.select_on == "holdout":
        fit_rows, judge_rows = split(train.labels, config.holdout, config.seed)
        judge = train
    found: dict[str, MethodResult] = {}
    predictors: dict[str, Predictor] = {}
    confusions: dict[str, np.ndarray] = {}
    for name, method in known.items():
        with clock.phase(name):
            found[name], predictors[name], confusions[name] = search(
                method, config, (train, fit_rows), (judge, judge_rows), (val, np.arange(len(val)))
            )
        best = found[name]
        note(f"{name}: {best.reported.metrics['top1']:.4f} on {config.val}, with {best.best.settings}")
    few_shot = []
    if "few_shot" in config.methods:
        with clock.phase("few_shot"):
            few_shot = few_shots(config, train, val)
    result = ProbeResult(
        model=config.model,
        model_hash=str(encoder.identity["model"]),
        preprocessing={name: encoder.identity[name] for name in ("image_size", "eval_crop_fraction", "mean", "std")},
        protocol=config.protocol,
        settings=dataclasses.asdict(config),
        train=described(train_source),
        holdout=described(train_source.only(judge_rows, judge_rows.tobytes()))
        if config.select_on == "holdout"
        else None,
        validation=described(val_source),
        selected_on="holdout" if config.select_on == "holdout" else "validation",
        methods=found,
        few_shot=few_shot,
        further=[],
        decomposition=None,
        seconds=clock.seconds,
    )
    winner = predictors[result.winner]
    result = dataclasses.replace(result, further=[judged(each, others[each.name], winner) for each in further])
    if config.decompose:
        with clock.phase("decomposition"):
            parts = decomposed(config, known, predictors, result, train, val)
        result = dataclasses.replace(result, decomposition=parts.to_json())
    write(workdir, result, winner, confusions[result.winner], train_source.class_names)
    return result


def open_sources(config: ProbeConfig, encoder: Encoder) -> tuple[Source, Source]:
    """The training and the reported set; raises `RecipeError`."""
    size, classes = encoder.recipe.model.image_size, encoder.config.num_classes
    try:
        train = open_source(config.train, "train", image_size=size, num_classes=classes)
        val = open_source(config.val, "validation", image_size=size, num_classes=classes)
        check_alike(train, val)
    except RecipeError as error:
        # Sources know themselves by the fields of a recipe.
        text = str(error).replace("data.train", "--train").replace("data.validation", "--val")
        raise RecipeError(text) from error
    for flag, source in (("--train", train), ("--val", val)):
        check(len(source) > 0, flag, source.name, "has no images")
    return train, val


def read_further(text: str, encoder: Encoder, num_classes: int) -> FurtherSource:
    """The set that NAME=SOURCE[,labels=FILE|,classes=FILE] describes; raises `RecipeError`."""
    name, equals, rest = text.partition("=")
    spec, *options = rest.split(",")
    ok = bool(equals and spec) and name.isidentifier() and len(options) <= 1
    check(ok, "--also", text, "needs NAME=SOURCE, NAME=SOURCE,labels=FILE or NAME=SOURCE,classes=FILE; NAME a word")
    size = encoder.recipe.model.image_size
    try:
        source = open_source(spec, "validation", image_size=size, num_classes=num_classes)
    except RecipeError as error:
        raise RecipeError(str(error).replace("data.validation", f"--also={name}")) from error
    if not options:
        count = source.num_classes
        found = f"has {count} classes, the training set {num_classes}; say which are which by classes=FILE"
        check(count == num_classes, "--also", text, found)
        return FurtherSource(name, source, same_classes(num_classes))
    kind, _, path = options[0].partition("=")
    check(
        kind in ("labels", "classes") and bool(path),
        "--also",
        text,
        "after the comma needs labels=FILE or classes=FILE",
    )
    answers = read_answers(kind, path, source.num_classes, source.class_names, len(source), num_classes)
    return FurtherSource(name, source, answers)


def features_folder(encoder: Encoder) -> str:
    """Of these features; others lie beside them."""
    return f"{','.join(encoder.terms)}-{encoder.recipe.model.image_size}px-{encoder.dtype.name}"


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: `fraction` of each class, at least one of a class of two and more."""
    rng, held = np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held.append(rng.permutation(rows)[:count])
    held_out = np.sort(np.concatenate(held))
    check(len(held_out) > 0, "--holdout", fraction, "every class has a single image; use --select_on val")
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def search(
    method: Method,
    config: ProbeConfig,
    fit: tuple[Features, np.ndarray],
    judge: tuple[Features, np.ndarray],
    report: tuple[Features, np.ndarray],
) -> tuple[MethodResult, Predictor, np.ndarray]:
    """Tries every setting of a method, and reports the best; `fit`, `judge`, `report`: rows of sets.

    With the best itself, and what it takes for what on the reported rows, as `confusion`.
    """
    start = time.perf_counter()
    candidates = method.candidates(*fit, *judge)
    index = max(range(len(candidates)), key=lambda i: candidates[i].metrics["top1"])
    best, train = candidates[index], fit[0]
    # Where settings were judged by other images than the training set's, that has been used in full already.
    again = config.refit and len(fit[1]) < len(train)
    predict = method.fit(best.settings, train, np.arange(len(train))) if again else best.predict
    features, rows = report
    logits, labels = predict(features, rows), features.labels[rows]
    scored = score(logits, labels, same_classes(features.num_classes))
    trials = [Trial(each.settings, each.metrics) for each in candidates]
    result = MethodResult(trials, index, reported(scored), time.perf_counter() - start)
    return result, predict, confusion(logits, labels, features.num_classes)


def few_shots(config: ProbeConfig, train: Features, val: Features) -> list[FewShot]:
    """The first feature's top-1 from few images of each class; numbers of shots that a class does not have are left."""
    fewest = int(np.bincount(train.labels)[np.unique(train.labels)].min())
    found = []
    for shots in config.shots:
        if shots > fewest:
            note(f"few_shot: {shots} shots left out, a class has {fewest} images")
            continue
        top1 = []
        for seed in range(config.shot_seeds):
            head = closed_form.few_shot(train, config.features[0], np.arange(len(train)), shots, seed)
            top1.append(heads.measure(head, val, np.arange(len(val)))[0].result()["top1"])
        found.append(FewShot(shots, float(np.mean(top1)), top1))
    return found


def judged(further: FurtherSource, features: Features, predict: Predictor) -> FurtherSet:
    logits = predict(features, np.arange(len(features)))
    return FurtherSet(further.name, further.source.name, reported(score(logits, features.labels, further.answers)))


def decomposed(
    config: ProbeConfig,
    known: dict[str, Method],
    predictors: dict[str, Predictor],
    result: ProbeResult,
    train: Features,
    val: Features,
) -> decompose.Decomposition:
    """The error of the best linear method's best settings, in parts."""
    linear = {name: method for name, method in known.items() if isinstance(method, Linear)}
    name = max(linear, key=lambda name: result.methods[name].best.metrics["top1"])
    settings, best = result.methods[name].best.settings, predictors[name]

    def fit(rows: np.ndarray) -> Heads:
        return linear[name].fit(settings, train, rows).head

    # Without a refit the best was trained on a part of the rows.
    trained = config.refit or config.select_on == "val"
    whole = best.head if trained and isinstance(best, LinearPredictor) else fit(np.arange(len(train)))
    approximation = None if math.isnan(config.approximation) else config.approximation
    return decompose.decompose(whole, fit, train, val, config.seed, approximation)


def described(source: Source) -> ImageSet:
    return ImageSet(source.name, len(source), source.fingerprint())


def write(
    workdir: Path, result: ProbeResult, winner: Predictor, confused: np.ndarray, class_names: tuple[str, ...]
) -> None:
    """Results into a folder of their own for each choice of flags; the winner's head too, where it is linear."""
    if jax.process_index() > 0:
        return
    settings = json.dumps(result.settings, sort_keys=True, default=str)
    folder = workdir / f"{result.protocol}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", to_json(result))
    write_page(folder / "report.html", result, confused, class_names)
    if isinstance(winner, LinearPredictor):
        head = winner.head
        np.savez(
            folder / "head.npz", feature=head.feature, kernel=np.asarray(head.kernel[0]), bias=np.asarray(head.bias[0])
        )
    print(table(result))
    print(f"written: {folder}")


def note(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
