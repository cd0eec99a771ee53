"""What a probe says: scores against loops in fp64 and the device's metrics, intervals, and the three ways to print."""

import dataclasses
import html.parser
import itertools
import json
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from vit22b.config import LossConfig
from vit22b.errors import RecipeError
from vit22b.metrics import classification_sums
from vit22b.probing import page, result, scoring
from vit22b.probing.scoring import Answers, read_answers, same_classes, score

RNG = np.random.default_rng(0)
IMAGES, CLASSES = 2500, 7  # several times the rows that are judged at a time
LABELS = RNG.integers(CLASSES, size=IMAGES, dtype=np.int32)
LOGITS = RNG.normal(size=(IMAGES, CLASSES)).astype(np.float32) + 1.5 * np.eye(CLASSES, dtype=np.float32)[LABELS]
FOLDERS = ("ant", "bee", "cat", "dog")  # classes of a set of its own
MAPPED = {"dog": 1, "ant": [5, 2], "bee": None, "cat": [5]}

_sums = jax.jit(lambda x, y: classification_sums(x, y, np.ones(len(y), np.float32), LossConfig()))
_sums_of_each = jax.jit(jax.vmap(lambda x, y: classification_sums(x[None], y[None], np.ones(1), LossConfig())))


def write(folder: Path, content: object) -> str:
    path = folder / "answers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def by_hand(logits: np.ndarray, right: list[list[int]], allowed: list[int]) -> dict[str, float]:
    """Image by image in fp64; ties go to the lower class, as a stable sort leaves them."""
    top1, top5, losses = [], [], []
    for row, wanted in zip(logits.astype(np.float64), right, strict=True):
        if wanted:
            order = sorted(allowed, key=lambda c, row=row: -row[c])
            probabilities = np.exp(row) / sum(np.exp(row[c]) for c in allowed)
            top1.append(order[0] in wanted)
            top5.append(any(c in wanted for c in order[:5]))
            losses.append(-np.log(sum(probabilities[c] for c in set(wanted))))
    return {"top1": np.mean(top1), "top5": np.mean(top5), "loss": np.mean(losses), "examples": len(top1)}


@pytest.mark.parametrize("kind", ["continuous", "ties", "constant"])
def test_plain_labels_score_as_on_the_device(kind: str) -> None:
    logits = {"continuous": LOGITS, "ties": np.round(LOGITS), "constant": np.zeros_like(LOGITS)}[kind]
    got, sums = score(logits, LABELS, same_classes(CLASSES)), _sums(logits, LABELS)
    wanted = sums.result()
    assert got.metrics.keys() == wanted.keys()
    assert got.metrics["examples"] == IMAGES
    for name in ("top1", "top5"):
        assert got.metrics[name] == wanted[name]
    for name in ("loss", "ece"):
        np.testing.assert_allclose(got.metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got.correct_N, np.asarray(_sums_of_each(logits, LABELS).top1) == 1)
    images, confidence, accuracy = got.bins.T
    np.testing.assert_array_equal(images, sums.bin_count)
    np.testing.assert_array_equal(np.rint(accuracy * images), sums.bin_correct)
    np.testing.assert_allclose(confidence * images, sums.bin_confidence, rtol=1e-4)


@pytest.mark.parametrize(
    ("places", "value"),
    [(range(CLASSES), np.nan), ([3], np.nan), ([5], np.nan), ([3], np.inf), ([5], np.inf), ([5], -np.inf)],
)
def test_what_is_not_finite_ranks_as_on_the_device(places: list[int], value: float) -> None:
    """The label is 3, a winner: NaN and +inf elsewhere push it back by one, -inf does not."""
    logits = np.zeros((1, CLASSES), np.float32)
    logits[0, 3] = 4.0
    logits[0, places] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = score(logits, np.array([3]), same_classes(CLASSES))
    wanted = _sums(logits, np.array([3])).result()
    assert (got.metrics["top1"], got.metrics["top5"]) == (wanted["top1"], wanted["top5"])
    if value != -np.inf:
        assert not np.isfinite(got.metrics["loss"])
        assert np.isnan(got.metrics["ece"])


def test_of_several_right_classes_one_that_is_nan_or_impossible_does_not_help() -> None:
    logits = np.array([[np.nan, 1.0, 0.0], [-np.inf, 0.0, 1.0], [-np.inf, -np.inf, 0.0]], np.float32)
    answers = Answers(np.array([[0, 1]] * 3, np.int32), False, np.arange(3))
    np.testing.assert_array_equal(score(logits, np.zeros(3, int), answers).correct_N, [False] * 3)
    second = score(logits[1:2], np.zeros(1, int), Answers(np.array([[0, 2]], np.int32), False, np.arange(3)))
    assert second.metrics["top1"] == 1
    assert second.metrics["loss"] == pytest.approx(np.log(1 + np.exp(-1)))


@pytest.mark.parametrize("label", range(CLASSES))
def test_an_impossible_class_is_never_among_the_first(label: int) -> None:
    """Of two nearest neighbours with votes for 2 and 4, whatever the numbers of classes without a vote."""
    logits = np.full((1, CLASSES), -np.inf)
    logits[0, [2, 4]] = np.log([0.75, 0.25])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = score(logits, np.array([label]), same_classes(CLASSES)).metrics
        elsewhere = score(
            logits, np.array([label]), Answers(np.array([[0]], np.int32), False, np.array([0, 1]))
        ).metrics
    assert got["top1"] == (label == 2)
    assert got["top5"] == (label in (2, 4))
    assert got["loss"] == pytest.approx({2: -np.log(0.75), 4: -np.log(0.25)}.get(label, np.inf))
    assert got["ece"] == pytest.approx(abs(0.75 - (label == 2)))
    assert (elsewhere["top1"], elsewhere["loss"], elsewhere["ece"]) == (0, np.inf, 0)


def test_certain_and_surely_wrong_predictions_overflow_nowhere() -> None:
    logits = np.where(np.eye(3), 1e4, -1e4).astype(np.float32)
    assert score(logits, np.arange(3), same_classes(3)).metrics["loss"] == 0
    assert score(logits, np.array([1, 2, 0]), same_classes(3)).metrics["loss"] == 2e4


@pytest.mark.parametrize("round_to", [3, 0])
def test_any_of_several_right_labels_counts(tmp_path: Path, round_to: int) -> None:
    rng = np.random.default_rng(1)
    right = [rng.permutation(CLASSES)[: rng.integers(4)].tolist() for _ in range(IMAGES)]
    answers = read_answers("labels", write(tmp_path, right), CLASSES, (), IMAGES, CLASSES)
    logits = np.round(LOGITS, round_to)
    got = score(logits, LABELS, answers)
    wanted = by_hand(logits, right, list(range(CLASSES)))
    assert len(got.correct_N) == wanted["examples"] == sum(map(bool, right)) < IMAGES
    assert {name: got.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert got.correct_N.mean() == got.metrics["top1"]


@pytest.mark.parametrize("form", ["object", "list"])
def test_classes_of_another_set_restrict_the_predictions(tmp_path: Path, form: str) -> None:
    content = MAPPED if form == "object" else [MAPPED[name] for name in FOLDERS]
    names = FOLDERS if form == "object" else ()
    answers = read_answers("classes", write(tmp_path, content), len(FOLDERS), names, IMAGES, CLASSES)
    labels = np.random.default_rng(2).integers(len(FOLDERS), size=IMAGES, dtype=np.int32)
    got = score(LOGITS, labels, answers)
    wanted = by_hand(LOGITS, [[[5, 2], [], [5], [1]][label] for label in labels], [1, 2, 5])
    assert wanted["examples"] == (labels != 1).sum()
    assert {name: got.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    everything = LOGITS.copy()
    everything[:, [0, 3, 4, 6]] = 1e3  # classes that do not occur
    assert score(everything, labels, answers).metrics == got.metrics


def test_a_repeated_right_class_has_its_probability_once(tmp_path: Path) -> None:
    answers = read_answers("labels", write(tmp_path, [[1, 1]]), 2, (), 1, 2)
    assert score(np.zeros((1, 2), np.float32), np.zeros(1, int), answers).metrics["loss"] == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        ("labels", [[0]] * 4, "has 4 entries; needs 5, one for each image"),
        ("labels", [[0], [1, 7], [], [], []], "entry 1 has 7; needs class numbers, 0 to 6"),
        ("labels", [[0], [1], [-1], [], []], "entry 2 has -1"),
        ("labels", [[0], [True], [], [], []], "entry 1 has true"),
        ("labels", [["cat"], [], [], [], []], 'entry 0 has "cat"'),
        ("labels", [[]] * 5, "leaves all images out"),
        ("labels", {"0": [1]}, "needs a list with an entry for each image"),
        ("labels", "[[0], ", "cannot be read as JSON"),
        ("classes", [0, 1, 2], "has 3 entries; needs 4, one for each class"),
        ("classes", [0, 1, 2, 2.5], "entry 3 has 2.5"),
        ("classes", MAPPED | {"cow": 3}, "'cow' is no class folder of the set; those are ant, bee, cat, ..."),
        ("classes", {"ant": 1, "bee": 2, "dog": 1}, "has no entry for class 'cat'; null leaves its images out"),
        ("classes", MAPPED | {"cat": [9]}, "entry 'cat' has 9; needs class numbers, 0 to 6"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, kind: str, content: object, complaint: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match=re.escape(complaint)) as error:
        read_answers(kind, path, len(FOLDERS), FOLDERS, 5, CLASSES)
    assert str(error.value).startswith(f"--also={path}: ")
    assert "\n" not in str(error.value)


def test_more_mistakes_with_further_sets(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the set's classes have none; give a list of 4 entries"):
        read_answers("classes", write(tmp_path, MAPPED), len(FOLDERS), (), 5, CLASSES)
    with pytest.raises(RecipeError, match=r"--also=.*missing\.json: cannot be read"):
        read_answers("labels", str(tmp_path / "missing.json"), 4, (), 5, CLASSES)
    answers = Answers(np.array([[3], [-1]], np.int32), True, np.array([3]))
    with pytest.raises(RecipeError, match="--also=2 images: none is of a class"):
        score(LOGITS[:2], np.array([1, 1]), answers)


@pytest.mark.parametrize(("images", "right"), [(400, 300), (2500, 2200), (30, 1)])
def test_the_interval_is_that_of_the_bootstrap(images: int, right: int) -> None:
    """The resampled mean is binomial: its quantiles are known, and a bootstrap of indices agrees."""
    rng = np.random.default_rng(3)
    correct = rng.permutation(np.arange(images) < right)
    low, high = scoring.interval(correct)
    exact = scipy.stats.binom.ppf([0.025, 0.975], images, right / images) / images
    drawn = np.percentile([correct[rng.integers(images, size=images)].mean() for _ in range(4000)], [2.5, 97.5])
    deviation = np.sqrt(right / images * (1 - right / images) / images)
    np.testing.assert_allclose([low, high], exact, rtol=0, atol=0.1 * deviation + 1 / images)
    np.testing.assert_allclose([low, high], drawn, rtol=0, atol=0.2 * deviation + 1 / images)
    assert (low, high) == scoring.interval(correct)
    # Of all right or all wrong, Wilson's: the shares p that are within 1.96 deviations sqrt(p (1 - p) / n).
    low, high = scoring.interval(np.ones(images, bool))
    assert high == 1
    assert 1 - low == pytest.approx(scipy.stats.norm.ppf(0.975) * np.sqrt(low * (1 - low) / images), rel=1e-6)
    assert scoring.interval(np.zeros(images, bool)) == pytest.approx((0, 1 - low))


def test_confusion_counts_every_image_once() -> None:
    got = scoring.confusion(LOGITS[:, :6], np.minimum(LABELS, 4), 6)  # class 5 has no image
    wanted = sklearn.metrics.confusion_matrix(np.minimum(LABELS, 4), LOGITS[:, :6].argmax(1), labels=range(6))
    np.testing.assert_array_equal(got, wanted)
    assert got.sum() == IMAGES


def made_up(**changes: object) -> result.ProbeResult:
    """'sgd' wins where settings are chosen, though 'knn' is better on the reported set."""

    def reported(right: float) -> result.Reported:
        bins = np.array([[0, 0, 0]] * 13 + [[40, 0.9, 0.8], [60, 0.97, 0.99]])
        metrics = {"top1": right, "top5": 0.9871, "loss": 0.4567, "ece": 0.0123, "examples": 10_000}
        return result.Reported(metrics, (right - 0.0111, right + 0.0112), bins.tolist())

    def trial(top1: float, **settings: object) -> result.Trial:
        loss = float("nan") if top1 == 0.1 else 1 - top1
        return result.Trial(settings, {"top1": top1, "top5": 0.9, "loss": loss, "ece": 0.1, "examples": 500})

    grid = list(itertools.product((0.1, 1.0, 10.0), (0.0, 1e-4), (10, 30)))
    accuracies = np.array([0.811, 0.812, 0.813, 0.814, 0.821, 0.822, 0.8765, 0.824, 0.1, 0.1, 0.1, 0.1])
    sgd = [
        trial(float(top1), feature="cls", learning_rate=rate, weight_decay=decay, epochs=epochs)
        for top1, (rate, decay, epochs) in zip(accuracies, grid, strict=True)
    ]
    knn = [trial(0.75, feature="cls", neighbours=10), trial(0.7, feature="cls", neighbours=np.int64(20))]
    images = result.ImageSet("folder:/data/<b>birds</b>", 9000, "folder-9000-abc", "def")
    probe = result.ProbeResult(
        model="runs/<mine>",
        model_hash="0123abcd",
        preprocessing={"image_size": 224},
        protocol="sweep",
        settings={"learning_rates": (0.1, 1.0, 10.0), "approximation": float("nan")},
        train=images,
        holdout=dataclasses.replace(images, images=1000),
        validation=images,
        selected_on="holdout",
        methods={
            "knn": result.MethodResult(knn, 0, reported(0.9012), 0.5),
            "sgd": result.MethodResult(sgd, 6, reported(0.8642), 12.3),
        },
        few_shot=[result.FewShot("mean@2", 1, 0.4, [0.38, 0.42]), result.FewShot("mean@2", 5, 0.6, [0.6, 0.6])],
        further=[result.FurtherSet("real", images, reported(0.8877))],
        decomposition=result.ErrorParts(
            "sgd",
            sgd[6].settings,
            {"approximation": None, "usability": 0.08, "probe_generalization": -0.003, "total": 0.14},
        ),
        remarks=["of 5 shots, 1 class < 5 images"],
        seconds={"features": 81.26},
    )
    return dataclasses.replace(probe, **changes)


def test_json_holds_everything_and_round_trips() -> None:
    content = result.to_json(made_up())
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again == content
    assert again["winner"] == "sgd"
    best = again["methods"]["sgd"]["trials"][again["methods"]["sgd"]["winner"]]
    assert best["settings"] == {"feature": "cls", "learning_rate": 1.0, "weight_decay": 1e-4, "epochs": 10}
    assert again["methods"]["sgd"]["trials"][-1]["metrics"]["loss"] is None
    assert again["methods"]["sgd"]["reported"]["interval"] == pytest.approx([0.8531, 0.8754])
    assert again["methods"]["knn"]["trials"][1]["settings"]["neighbours"] == 20
    assert again.keys() - {"winner"} == {field.name for field in dataclasses.fields(result.ProbeResult)}


def test_a_score_is_reported_with_its_interval_and_bins() -> None:
    judged = score(LOGITS, LABELS, same_classes(CLASSES))
    got = result.reported(judged, ())
    assert got.metrics == judged.metrics
    assert got.interval == scoring.interval(judged.correct_N)
    assert sum(images for images, _, _ in got.bins) == IMAGES


def test_what_means_nothing_is_null_a_dash_and_no_figure(tmp_path: Path) -> None:
    judged = score(LOGITS, LABELS, same_classes(CLASSES))
    ridge = result.MethodResult(
        [result.Trial({"feature": "cls", "l2": 1.0}, result.meaningful(judged.metrics, ("loss", "ece")))],
        0,
        result.reported(judged, ("loss", "ece")),
        0.1,
    )
    probe = made_up(methods={"ridge": ridge}, further=[])
    content = json.loads(json.dumps(result.to_json(probe), allow_nan=False))["methods"]["ridge"]
    for metrics in (content["reported"]["metrics"], content["trials"][0]["metrics"]):
        assert (metrics["loss"], metrics["ece"]) == (None, None)
        assert metrics["top5"] == judged.metrics["top5"]
    (line,) = (line for line in result.table(probe).splitlines() if line.startswith("ridge *"))
    top5 = f"{100 * judged.metrics['top5']:.2f}"
    assert re.search(rf" {top5} +– +– +1 ", line)
    page.write_page(tmp_path / "page.html", probe, np.eye(4, dtype=int), FOLDERS)
    assert "Reliability" not in (tmp_path / "page.html").read_text()
    page.write_page(tmp_path / "page.html", made_up(), np.eye(4, dtype=int), FOLDERS)
    assert "Reliability" in (tmp_path / "page.html").read_text()


def test_the_head_whose_error_has_parts_is_named_and_whether_it_is_the_winner(tmp_path: Path) -> None:
    for winner, other in (("sgd", ""), ("knn", " (not the winner, knn, which is not linear)")):
        methods = made_up().methods
        if winner == "knn":
            better = dataclasses.replace(
                methods["knn"].trials[0], metrics={"top1": 0.99, "top5": 1, "loss": 0, "ece": 0}
            )
            methods = methods | {"knn": dataclasses.replace(methods["knn"], trials=[better])}
        probe = made_up(methods=methods)
        assert probe.winner == winner
        page.write_page(tmp_path / "page.html", probe, np.eye(4, dtype=int), FOLDERS)
        title = f"Parts of the error of sgd{other}, feature cls, learning_rate 1, weight_decay 0.0001, epochs 10"
        for lines in (result.table(probe).splitlines(), read(tmp_path / "page.html").texts):
            assert title in lines
            assert "Few-shot, mean@2" in lines
        content = result.to_json(probe)
        assert content["decomposition"]["method"] == "sgd"
        assert content["decomposition"]["settings"]["learning_rate"] == 1
        assert content["few_shot"][0]["feature"] == "mean@2"


def test_remarks_are_in_the_table_and_marked_on_the_page(tmp_path: Path) -> None:
    assert "of 5 shots, 1 class < 5 images" in result.table(made_up()).splitlines()
    page.write_page(tmp_path / "page.html", made_up(), np.eye(4, dtype=int), FOLDERS)
    assert '<p class="note">of 5 shots, 1 class &lt; 5 images</p>' in (tmp_path / "page.html").read_text()
    assert result.to_json(made_up())["remarks"] == ["of 5 shots, 1 class < 5 images"]


def test_the_table_lists_the_winner_in_columns() -> None:
    lines = result.table(made_up()).splitlines()
    (winner,) = (line for line in lines if line.startswith("sgd *"))
    for cell in ("87.65", "86.42", "85.31 – 87.54", "98.71", "0.4567", "0.0123", "12.3"):
        assert cell in winner
    assert winner.endswith("feature cls, learning_rate 1, weight_decay 0.0001, epochs 10")
    (header,) = (line for line in lines if line.startswith("method "))
    (knn,) = (line for line in lines if line.startswith("knn "))
    assert not knn.startswith("knn *")
    for name in ("held out", "top-1", "loss", "seconds"):  # numbers end below the end of their header
        end = header.index(name) + len(name)
        assert all(line[end - 1].isdigit() and line[end : end + 2] == "  " for line in (knn, winner))
    assert any(re.match(r"real +88\.77 ", line) for line in lines)
    assert any(re.match(r" +1 +40\.00 +38\.00, 42\.00", line) for line in lines)


def test_selection_on_the_reported_set_is_said_wherever_there_is_a_figure(tmp_path: Path) -> None:
    for selected_on, times in (("holdout", 0), ("validation", 1)):
        probe = made_up(selected_on=selected_on, holdout=None)
        page.write_page(tmp_path / "page.html", probe, np.eye(4, dtype=int), FOLDERS)
        for text in (result.table(probe), (tmp_path / "page.html").read_text()):
            assert text.count("optimistic") == times


class Reader(html.parser.HTMLParser):
    """Fails where tags are not balanced; keeps text, tables' rows, and what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.svg_texts: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "svg":
            self.svg_texts.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if "svg" in self.open and data.strip():
            self.svg_texts[-1].append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_shows_names_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    names = ["<script>alert(1)</script>", "a & b", "5$ and 6$", "猫\udce9"]  # of which the last byte is no UTF-8
    confusion = np.array([[40, 0, 3, 0], [0, 50, 0, 0], [9, 0, 30, 1], [0, 0, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page.write_page(path, made_up(), confusion, names)
    got = read(path)
    assert "script" not in got.seen
    assert all(reference.startswith(("#", "data:")) for reference in got.references)
    assert "url(http" not in path.read_text()
    text = "".join(got.texts)
    assert "Probe of runs/<mine>" in text
    assert "folder:/data/<b>birds</b>" in text
    names[3] = "猫�"
    assert [names[2], names[0], "9", "22.50"] in got.rows
    assert [row[2] for row in got.rows if row[0] in names] == ["9", "3", "1"]
    assert ["learning_rate", "1"] in got.rows
    assert ["learning_rates", "0.1,1,10"] in got.rows
    assert ["cls", "1", "0.0001", "10", "87.65", "90.00", "0.1235", "0.1000"] in got.rows
    assert "86.42 %" in text
    # Grids of both methods, reliability, confusions, few-shot, and parts of the error.
    knn, sgd, reliability, confused, few_shot, parts = got.svg_texts
    assert {"neighbours", "75.0", "70.0"} <= set(knn)
    assert {"learning_rate", "weight_decay", "epochs 10", "epochs 30", "82.4", "81.1", "10.0"} <= set(sgd)
    assert {"confidence", "accuracy"} <= set(reliability)
    assert {"<script>alert(1…", *names[1:], "93.0"} <= set(confused)
    assert {"training images per class", "1", "5"} <= set(few_shot)
    assert {"usability", "probe generalization"} <= set(parts)
    assert not {"approximation", "total"} & set(parts)


def test_a_page_of_a_thousand_classes_is_small_and_always_the_same(tmp_path: Path) -> None:
    confusion = np.random.default_rng(4).poisson(0.02, size=(1000, 1000)) + 40 * np.eye(1000, dtype=int)
    confusion[123, 456] = 31
    probe = made_up(few_shot=[], further=[], decomposition=None)
    for name in ("one.html", "two.html"):
        page.write_page(tmp_path / name, probe, confusion, ())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.html").stat().st_size < 1.5e6
    got = read(tmp_path / "one.html")
    assert len(got.svg_texts) == 4
    start = got.rows.index(["class", "taken for", "images", "% of the class"])
    assert got.rows[start + 1][:3] == ["123", "456", "31"]
    assert "5 neighbouring classes" in "".join(got.texts)
