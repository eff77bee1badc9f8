"""Is a difference in AP more than chance? A paired bootstrap over the validation images.

Images are drawn with replacement, the same ones for both sides, and AP is accumulated again for
every draw, with COCO's own rules: an image that is drawn twice counts twice. What a detection
matches does not depend on the other images, so each is matched once.

Trials are paired by seed: Δ is the mean over the pairs. One draw of images serves all pairs, and
with several pairs these are drawn with replacement too, so that the interval contains both kinds of
chance, the images and the seeds. Two or three seeds tell little about seeds (too narrow); noise
that each image and seed has of its own is drawn twice (too wide).

Interpolated precision overestimates on few images, and a draw, with its repeated images, does so
once more. Therefore the spread of the draws is used and not their level: the interval is moved so
that their mean lies on Δ. It says how far Δ varies between validation sets of this size.

Shapes: I images, D detections of a class by falling score, P of them true positives, B draws,
T IoU thresholds, S pairs of trials.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from tabulate import tabulate

from core.errors import InputError
from core.identity import identity
from core.results import ROWS_FILE, ResultRow, append_rows, is_set_aside, latest, read_rows
from detection.annotations import read_detections
from detection.saved import DATASET_FILE, RESULTS_FILE, matches, open_truth, tasks_of

Array = NDArray[Any]

THRESHOLDS = 10  # IoU 0.50, 0.55 … 0.95
METRICS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of the thresholds
RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
CELLS = 2_000_000  # of one D×B array: draws are worked off in blocks
LEVEL = 0.95
INTERVALS_FILE = "bootstrap.jsonl"


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """The matches of one class's detections.

    At each threshold, ``hits`` are the places (of D) of true positives, ``ignored`` those that
    matched a crowd and count for nothing.
    """

    images: Array  # D: the index of each detection's image
    objects: Array  # I: how many there are to find in each image
    hits: tuple[Array, ...]  # T
    ignored: tuple[Array, ...]  # T


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference and its interval, in percent points of AP."""

    delta: float | None  # None where AP is not defined
    low: float | None
    high: float | None

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True)
class Trial:
    """One detection run: its newest row, the annotations it was evaluated on, its detections."""

    row: ResultRow
    annotations: Path
    detections: Path

    @property
    def place(self) -> tuple[Any, ...]:
        """Return what two trials must share to be compared."""
        row = self.row
        return identity(row)._replace(metric="", code=""), self.annotations


def compare_runs(
    runs: Sequence[str],
    baseline: str = "ce",
    resamples: int = 1000,
    seed: int = 0,
    output: str | Path | None = None,
) -> list[ResultRow]:
    """Compare every initialisation with the baseline, write ``bootstrap.jsonl``, return its rows.

    Args:
        runs: run folders, or folders of them.
        resamples: draws of the images.
        seed: of the draws.
        output: folder of ``bootstrap.jsonl``; None: the first of ``runs``.

    Raises:
        InputError: no such folder, nothing to compare in it, or damaged files (named).
    """
    _check(resamples, seed)
    trials = [trial for folder in runs for trial in find_trials(Path(folder))]
    places: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        places.setdefault(trial.place, []).append(trial)
    groups = places.values()
    rows = [row for group in groups for row in _compare_place(group, baseline, resamples, seed)]
    if not rows:
        inits = ", ".join(sorted({trial.row.init for trial in trials})) or "none"
        raise InputError(
            f"nothing to compare with {baseline!r} in {', '.join(runs)}: needed are two "
            "initialisations with a common seed, protocol and config, and their saved "
            f"detections; there are detections of {inits}"
        )
    append_rows(Path(output or runs[0]) / INTERVALS_FILE, rows)
    return rows


def compare_files(
    truth: COCO,
    ours: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Comparison]:
    """Compare two lists of detections; return Δ per ``bbox/AP`` … of the tasks that both have."""
    _check(resamples, seed)
    generator = np.random.default_rng(seed)
    times = draws(len(truth.imgs), resamples, generator)
    found = {}
    for task in tasks_of([*ours, *baseline]):
        sides = [average_precisions(match(truth, side, task), times) for side in (ours, baseline)]
        for metric, comparison in compare(sides[:1], sides[1:], generator).items():
            found[f"{task}/{metric}"] = comparison
    return found


def find_trials(folder: Path) -> Iterator[Trial]:
    """Yield the detection runs in or below a folder that keep rows and detections.

    Left out are set-aside runs (``*.old1``) and data that are evaluated by other rules than COCO's.
    """
    if not folder.is_dir():
        raise InputError(f"run folder {folder} does not exist")
    for path in sorted(folder.rglob(RESULTS_FILE)):
        run = path.parent.parent if path.parent.name == "inference" else path.parent
        aside = is_set_aside(path, folder)
        if aside or not (run / ROWS_FILE).is_file() or not (run / DATASET_FILE).is_file():
            continue
        try:
            dataset = json.loads((run / DATASET_FILE).read_text(encoding="utf-8"))
            annotations, kind = Path(dataset["json"]), dataset.get("kind", "coco")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{run / DATASET_FILE} does not say where the json is") from None
        rows = [row for row in latest(read_rows(run / ROWS_FILE)) if row.step == "detection"]
        if rows and kind == "coco":
            yield Trial(max(rows, key=lambda row: row.time), annotations, path)


def table(found: dict[tuple[str, ...], Comparison]) -> str:
    """Return differences as text: name…, Δ, interval, and whether it leaves 0 out."""
    lines = [
        [
            *names,
            _signed(c.delta),
            f"{_signed(c.low)} … {_signed(c.high)}",
            "yes" if c.real else "no",
        ]
        for names, c in found.items()
    ]
    names = ["initialisation", "metric"][-len(next(iter(found))) :]
    heads = [*names, "Δ", f"{100 * LEVEL:g}% interval", "0 outside"]
    aligned = [*["left"] * len(names), *["right"] * 3]
    return tabulate(lines, heads, disable_numparse=True, colalign=aligned)


def as_comparison(row: ResultRow) -> Comparison:
    """Return what a row of ``bootstrap.jsonl`` says."""
    return Comparison(row.value, *row.details["interval"])


def match(truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str) -> list[ClassMatches]:
    """Match every image once, as pycocotools does; return the classes that have objects.

    Args:
        truth: the annotations.
        detections: of one run, in COCO's result format.
        iou_type: "bbox" or "segm".
    """
    index = {image: n for n, image in enumerate(sorted(truth.getImgIds()))}
    by_class: dict[int, list[dict[str, Any]]] = {}
    for entry in matches(truth, detections, iou_type):
        by_class.setdefault(entry["category_id"], []).append(entry)
    found = (_of_class(entries, index) for _, entries in sorted(by_class.items()))
    return [matched for matched in found if matched.objects.any()]


def draws(images: int, count: int, generator: np.random.Generator) -> Array:
    """Return how often each image is in each draw, I×(1+B); column 0 is the images as they are."""
    times = generator.multinomial(images, np.full(images, 1 / images), count)
    return np.concatenate([np.ones((1, images), np.int32), times.astype(np.int32)]).T.copy()


def average_precisions(classes: Sequence[ClassMatches], times: Array) -> Array:
    """Return AP (0..1) at each threshold in each draw, T×B; NaN where no object was drawn.

    A mean over the classes of which the draw has objects, as COCO's.

    Args:
        classes: as ``match`` gives them.
        times: I×B, as ``draws`` gives them.
    """
    total = np.zeros((THRESHOLDS, times.shape[1]))
    defined = np.zeros(times.shape[1])
    for matched in classes:
        to_find = matched.objects @ times  # B
        width = max(1, CELLS // max(1, len(matched.images)))
        for start in range(0, times.shape[1], width):
            block = slice(start, start + width)
            total[:, block] += _of_draws(matched, times[:, block], to_find[block])
        defined += to_find > 0
    with np.errstate(invalid="ignore"):
        return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def compare(
    ours: Sequence[Array], baseline: Sequence[Array], generator: np.random.Generator
) -> dict[str, Comparison]:
    """Return Δ (ours − baseline) with its interval, for AP, AP50 and AP75.

    Args:
        ours: per trial, ``average_precisions`` of ``draws``; column 0 gives Δ itself.
        baseline: the same trials of the other side, from the same draws.
        generator: draws trials where there are several.
    """
    pairs = np.stack([a - b for a, b in zip(ours, baseline, strict=True)])  # S×T×(1+B)
    trials, _, width = pairs.shape
    chosen = generator.integers(trials, size=(trials, width - 1))
    found = {}
    for metric, thresholds in METRICS.items():
        per_trial = 100 * pairs[:, thresholds].mean(axis=1)  # S×(1+B)
        delta = per_trial[:, 0].mean()
        drawn = np.take_along_axis(per_trial[:, 1:], chosen, axis=0).mean(axis=0)
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(delta) or not drawn.size:
            found[metric] = Comparison(None, None, None)
            continue
        around = drawn - drawn.mean() + delta
        low, high = np.quantile(around, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[metric] = Comparison(float(delta), float(low), float(high))
    return found


def _of_class(entries: list[dict[str, Any]], index: dict[int, int]) -> ClassMatches:
    """Put a class's images together and sort its detections by score, ties as COCO's code does."""
    objects = np.zeros(len(index), np.int32)
    for entry in entries:
        objects[index[entry["image_id"]]] = np.count_nonzero(~np.asarray(entry["gtIgnore"], bool))
    scored = [entry for entry in entries if len(entry["dtScores"])]
    if not scored:
        nothing = (np.empty(0, np.intp),) * THRESHOLDS
        return ClassMatches(np.empty(0, np.intp), objects, nothing, nothing)
    scores = np.concatenate([entry["dtScores"] for entry in scored])
    order = np.argsort(-scores, kind="stable")
    image = np.repeat(
        [index[entry["image_id"]] for entry in scored], [len(e["dtScores"]) for e in scored]
    )
    hit = np.concatenate([np.asarray(e["dtMatches"]) != 0 for e in scored], axis=1)[:, order]
    void = np.concatenate([np.asarray(e["dtIgnore"], bool) for e in scored], axis=1)[:, order]
    return ClassMatches(
        image[order],
        objects,
        tuple(np.flatnonzero(row) for row in hit & ~void),
        tuple(np.flatnonzero(row) for row in void),
    )


def _of_draws(matched: ClassMatches, times: Array, to_find: Array) -> Array:
    """Return one class's AP at each threshold in each draw, T×B; 0 where it has no object.

    Precision is looked at where a true positive stands: between two of them it only falls.
    """
    weights = times[matched.images]  # D×B: how often each detection is in each draw
    before = np.cumsum(weights, axis=0)
    found = np.zeros((THRESHOLDS, times.shape[1]))
    for t, (hits, ignored) in enumerate(zip(matched.hits, matched.ignored, strict=True)):
        if not len(hits):
            continue
        true = np.cumsum(weights[hits], axis=0)  # P×B
        counted = before[hits]
        if len(ignored):
            void = np.zeros((len(ignored) + 1, times.shape[1]), before.dtype)
            np.cumsum(weights[ignored], axis=0, out=void[1:])
            counted = counted - void[np.searchsorted(ignored, hits)]
        precision = true / (counted + np.spacing(1))
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = true / np.maximum(to_find, 1)
        reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)
        points = np.diff(reached, axis=0, prepend=0)  # recalls that each one is first to reach
        found[t] = (envelope * points).sum(axis=0) / len(RECALLS)
    return np.where(to_find > 0, found, 0.0)


def _compare_place(
    group: list[Trial], baseline: str, resamples: int, seed: int
) -> Iterator[ResultRow]:
    """Compare the initialisations of one protocol and data; all share the draws."""
    newest: dict[tuple[str, int | None], dict[int, Trial]] = {}
    for trial in sorted(group, key=lambda trial: trial.row.time):
        newest.setdefault((trial.row.init, trial.row.epoch), {})[trial.row.seed] = trial
    bases = [trials for (init, _), trials in newest.items() if init == baseline]
    others = {key: trials for key, trials in newest.items() if key[0] != baseline}
    if not bases or not any(trials.keys() & bases[-1].keys() for trials in others.values()):
        return
    truth = open_truth(group[0].annotations)
    generator = np.random.default_rng(seed)
    times = draws(len(truth.imgs), resamples, generator)
    base = {trial: _precisions(run, truth, times) for trial, run in bases[-1].items()}
    common = {"baseline": baseline, "level": LEVEL, "resamples": resamples}
    for trials in others.values():
        seeds = sorted(trials.keys() & base.keys())
        if not seeds:
            continue
        ours = [_precisions(trials[trial], truth, times) for trial in seeds]
        theirs = [base[trial] for trial in seeds]
        for task in ours[0]:
            if not all(task in side for side in (*ours, *theirs)):
                continue
            sides = [side[task] for side in ours], [side[task] for side in theirs]
            for metric, comparison in compare(*sides, generator).items():
                details = {"compared": f"{task}/{metric}", **common, "seeds": seeds}
                yield _row(trials[seeds[0]].row, comparison, seed, details)


def _precisions(trial: Trial, truth: COCO, times: Array) -> dict[str, Array]:
    detections = read_detections(trial.detections, truth)
    return {
        task: average_precisions(match(truth, detections, task), times)
        for task in tasks_of(detections)
    }


def _row(like: ResultRow, found: Comparison, seed: int, details: dict[str, Any]) -> ResultRow:
    return ResultRow(
        step="detection", protocol=like.protocol, dataset=like.dataset, split=like.split,
        metric=f"{details['compared']} minus {details['baseline']}", value=found.delta, unit="%",
        init=like.init, seed=seed, epoch=like.epoch, selection=like.selection, config=like.config,
        data=like.data, version=like.version, schema=like.schema,
        details=details | {"interval": [found.low, found.high]},
    )  # fmt: skip


def _check(resamples: int, seed: int) -> None:
    if resamples < 100:
        raise InputError(f"--resamples {resamples}: an interval needs 100 draws or more")
    if seed < 0:
        raise InputError(f"--seed {seed}: the seed of the draws must be 0 or more")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")
