"""Differences between initialisations with their intervals, from what detection runs have saved."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from core.errors import InputError
from core.identity import identity
from core.results import ROWS_FILE, ResultRow, append_rows, is_set_aside, latest, read_rows
from detection.annotations import read_detections
from detection.bootstrap import (
    LEVEL,
    Array,
    Comparison,
    average_precisions,
    compare,
    draws,
    match,
)
from detection.saved import DATASET_FILE, RESULTS_FILE, open_truth, tasks_of

INTERVALS_FILE = "bootstrap.jsonl"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One detection run: its newest row, the annotations it was judged on, its detections."""

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

    Left out are set-aside runs (``*.old1``) and data that other rules than COCO's judge.
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
