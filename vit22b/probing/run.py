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

from vit22b.errors import check
from vit22b.probing import closed_form, decompose, heads
from vit22b.probing.config import ProbeConfig
from vit22b.probing.encoder import Encoder
from vit22b.probing.heads import Heads
from vit22b.probing.methods import Linear, LinearPredictor, Method, Predictor, methods
from vit22b.probing.page import write_page
from vit22b.probing.result import (
    ErrorParts,
    FewShot,
    FurtherSet,
    ImageSet,
    MethodResult,
    ProbeResult,
    Trial,
    meaningful,
    printable,
    reported,
    table,
    to_json,
)
from vit22b.probing.rows import Features
from vit22b.probing.scoring import Answers, confusion, same_classes, score, without_examples
from vit22b.probing.sets import check_labels, content, open_further, open_sources
from vit22b.probing.store import extract
from vit22b.sources import Source
from vit22b.workdir import write_json

PREPROCESSING = ("image_size", "eval_resize", "eval_crop_fraction", "mean", "std")  # of an encoder's identity


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

    What the flags can be wrong about is told before the first image is read, except where labels decide.
    """
    settings = dataclasses.asdict(config)
    image_size = encoder.recipe.model.image_size
    train_source, val_source = open_sources(config, image_size, encoder.config.num_classes)
    num_classes = max(train_source.num_classes, val_source.num_classes)
    further = [open_further(text, train_source, image_size, num_classes) for text in config.also]
    clock, kept = Clock(), workdir / "features" / features_folder(encoder)
    images: dict[str, ImageSet] = {}

    def extracted(name: str, source: Source, answers: Answers) -> Features:
        images[name] = described(source, content(source))
        identity = encoder.identity | {"content": images[name].content}
        with clock.phase("extraction"):
            found = extract(kept / name, source, encoder.recipe, encoder.see, identity, note)
        if answers.by_class:
            check_labels(source, found.labels)
        return dataclasses.replace(found, num_classes=num_classes)

    same = same_classes(num_classes)
    train, val = extracted("train", train_source, same), extracted("val", val_source, same)
    others = {each.name: extracted(f"also-{each.name}", each.source, each.answers) for each in further}
    untrained = remark_on_untrained(val_source, val, same, train)
    check(not (untrained and config.decompose), "--decompose", "true", f"needs images of every class; {untrained}")
    remarks = [untrained, *(remark_on_untrained(s.source, others[s.name], s.answers, train) for s in further)]
    remarks = [each for each in remarks if each]

    everything = np.arange(len(train))
    fit_rows, judge, judge_rows = everything, val, np.arange(len(val))
    if config.select_on == "holdout":
        fit_rows, judge_rows = split(train.labels, config.holdout, config.seed)
        judge = train
    config = with_possible_neighbours(config, len(fit_rows), remarks)
    known = methods(config, encoder, train_source, len(fit_rows), remarks.append)
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
            few_shot = few_shots(config, train, val, remarks)
    result = ProbeResult(
        model=config.model,
        model_hash=str(encoder.identity["model"]),
        preprocessing={name: encoder.identity[name] for name in PREPROCESSING},
        protocol=config.protocol,
        settings=settings,
        train=images["train"],
        holdout=described(train_source.only(judge_rows, judge_rows.tobytes()), images["train"].content)
        if config.select_on == "holdout"
        else None,
        validation=images["val"],
        selected_on="holdout" if config.select_on == "holdout" else "validation",
        methods=found,
        few_shot=few_shot,
        further=[],
        decomposition=None,
        remarks=remarks,
        seconds=clock.seconds,
    )
    winner = predictors[result.winner]
    meaningless = known[result.winner].meaningless(result.methods[result.winner].best.settings)
    for each in further:
        features = others[each.name]
        scored = score(winner(features, np.arange(len(features))), features.labels, each.answers)
        result.further.append(FurtherSet(each.name, images[f"also-{each.name}"], reported(scored, meaningless)))
    if config.decompose:
        with clock.phase("decomposition"):
            parts = decomposed(config, known, predictors, result, train, val)
        result = dataclasses.replace(result, decomposition=parts)
    write(workdir, result, winner, confusions[result.winner], train_source.class_names)
    return result


def features_folder(encoder: Encoder) -> str:
    """Of these features, which the manifests in it name: names of many would be too long for a folder's."""
    names = hashlib.sha256(json.dumps(list(encoder.terms)).encode()).hexdigest()[:8]
    return f"{names}-{encoder.recipe.model.image_size}px-{encoder.dtype.name}"


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
    trials = [Trial(each.settings, meaningful(each.metrics, method.meaningless(each.settings))) for each in candidates]
    shown = reported(scored, method.meaningless(best.settings))
    result = MethodResult(trials, index, shown, time.perf_counter() - start)
    return result, predict, confusion(logits, labels, features.num_classes)


def remark_on_untrained(source: Source, features: Features, answers: Answers, train: Features) -> str:
    """How many images cannot be right, as their classes have no training images; '' if none."""
    count = int(without_examples(features.labels, answers, np.unique(train.labels)).sum())
    of = f"{source.request.field}: {count:,} of {len(source):,} images are of classes that --train has no images of"
    return f"{of}, and count as errors" if count else ""


def with_possible_neighbours(config: ProbeConfig, count: int, remarks: list[str]) -> ProbeConfig:
    """With numbers of neighbours that `count` training images have; raises `RecipeError` if none is left."""
    possible = tuple(each for each in config.neighbours if each <= count)
    if possible == config.neighbours or "knn" not in config.methods:
        return config
    check(bool(possible), "--neighbours", config.neighbours, f"there are {count} training images; give at most as many")
    left = ", ".join(str(each) for each in config.neighbours if each > count)
    remarks.append(f"knn: {left} neighbours left out, as {count} images are trained on")
    return dataclasses.replace(config, neighbours=possible)


def few_shots(config: ProbeConfig, train: Features, val: Features, remarks: list[str]) -> list[FewShot]:
    """The first feature's top-1 from few images of each class, or from all where a class has fewer."""
    images_of = np.bincount(train.labels)[np.unique(train.labels)]
    feature, found = config.features[0], []
    for shots in config.shots:
        fewer = int(np.sum(images_of < shots))
        if fewer:
            remarks.append(
                f"few_shot: {fewer} of {len(images_of)} classes have fewer than {shots} images, and give all"
            )
        top1 = []
        for seed in range(config.shot_seeds):
            head = closed_form.few_shot(train, feature, np.arange(len(train)), shots, seed)
            top1.append(heads.measure(head, val, np.arange(len(val)))[0].result()["top1"])
        found.append(FewShot(feature, shots, float(np.mean(top1)), top1))
    return found


def decomposed(
    config: ProbeConfig,
    known: dict[str, Method],
    predictors: dict[str, Predictor],
    result: ProbeResult,
    train: Features,
    val: Features,
) -> ErrorParts:
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
    found = decompose.decompose(whole, fit, train, val, config.seed, approximation)
    return ErrorParts(name, settings, found.to_json())


def described(source: Source, content: str) -> ImageSet:
    return ImageSet(source.name, len(source), source.fingerprint(), content)


def write(
    workdir: Path, result: ProbeResult, winner: Predictor, confused: np.ndarray, class_names: tuple[str, ...]
) -> None:
    """Results into a folder of their own for each choice of flags, model and images; the winner's head, if linear."""
    if jax.process_index() > 0:
        return
    sets = [result.train, result.validation, *(each.images for each in result.further)]
    inputs = [result.settings, result.model_hash, result.preprocessing, [dataclasses.asdict(each) for each in sets]]
    told = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
    folder = workdir / f"{result.protocol}-{told}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", to_json(result))
    if isinstance(winner, LinearPredictor):
        head = winner.head
        np.savez(
            folder / "head.npz", feature=head.feature, kernel=np.asarray(head.kernel[0]), bias=np.asarray(head.bias[0])
        )
    note(table(result))
    write_page(folder / "report.html", result, confused, class_names)
    note(f"written: {folder}")


def note(text: str) -> None:
    if jax.process_index() == 0:
        print(printable(text), flush=True)
