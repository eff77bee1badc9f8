"""The sections of a page beside its tables: curves, provenance, classes, published numbers."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from core.results import latest
from report.reference import PublishedTable, load_reference
from report.runs import Curve, Run
from report.tables import FAMILIES, Table
from report.timeline import is_timeline

PRETRAIN_CURVES = ("loss", "loss_ce", "loss_ias", "loss_ips", "top1")  # then any other loss_*
DETECTION_CURVES = ("total_loss", "loss_cls", "loss_box_reg", "loss_mask")  # then other losses
SPEED_CURVES = ("lr", "time", "data_time")  # of detectron2's metrics.json; times in s an iteration


@dataclasses.dataclass(frozen=True)
class CurveGroup:
    """Curves that share a legend: per logged key, (initialisation, curve) of every run."""

    title: str
    curves: dict[str, list[tuple[str, Curve]]]
    x: str = "iteration"


def curve_groups(runs: Sequence[Run]) -> list[CurveGroup]:
    """Return the curves of pretraining, then those of each detection protocol."""
    pretraining = [(run.init, run.pretrain) for run in runs]
    groups = [_group("Pretraining", pretraining, PRETRAIN_CURVES, ("lr",))]
    protocols: dict[str, list[tuple[str, dict[str, Curve]]]] = {}
    for run in runs:
        if run.detection:
            name = run.rows[0].protocol if run.rows else run.path.parent.name
            protocols.setdefault(name, []).append((run.init, run.detection))
    groups += [
        _group(f"Detection, {name}", found, DETECTION_CURVES, SPEED_CURVES)
        for name, found in protocols.items()
    ]
    return [group for group in groups if group.curves]


def provenance(runs: Sequence[Run], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return one entry per run, measurement place and weights: where its rows come from.

    A timeline, which has hundreds of those, is one entry a data set: that of its newest row.
    """
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for row in latest(run.rows):
            key: tuple[Any, ...] = (run.path, row.protocol, row.dataset, row.code)
            if not is_timeline(row):
                key += (row.split, row.weights, row.config, row.data)
            found = entries.setdefault(key, {"count": 0})
            if is_timeline(row) or not found["count"]:
                found |= {
                    "row": row,
                    "label": labels.get(row.init, row.init),
                    "run": f"{run.path.parent.name}/{run.path.name}",
                    "details": ", ".join(_words(row.details)),
                }
            found["count"] += 1
    return list(entries.values())


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Runs of one detection table that keep AP per class and curves, for one task."""

    title: str  # the table's
    family: str  # "bbox", "mask", "keypoint"
    runs: tuple[tuple[str, dict[str, Any]], ...]  # (initialisation, its part of coco_metrics.json)


def evaluated_groups(runs: Sequence[Run], tables: Sequence[Table]) -> list[Evaluated]:
    """Return, per detection table and task, the trials that its lines are made of."""
    groups = []
    for table in tables:
        if table.step != "detection":
            continue
        counted = {id(row) for line in table.lines for row in line.rows}
        own = [run for run in runs if any(id(row) in counted for row in run.rows)]
        for task in dict.fromkeys(task for run in own for task in run.evaluation):
            found = [(run.init, run.evaluation[task]) for run in own if task in run.evaluation]
            groups.append(Evaluated(table.title, FAMILIES.get(task, task), tuple(found)))
    return groups


def class_tables(groups: Sequence[Evaluated], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return AP per class and initialisation, a mean over trials."""
    views = []
    for group in groups:
        values: dict[str, dict[str, list[float]]] = {}
        for init, evaluation in group.runs:
            for name, value in evaluation["per_class"].items():
                found = values.setdefault(name, {}).setdefault(init, [])
                if value is not None:
                    found.append(value)
        present = {init for init, _ in group.runs}
        inits = [init for init in labels if init in present]
        lines = [(name, [_mean(by_init.get(i)) for i in inits]) for name, by_init in values.items()]
        if lines:
            title = f"{group.family} AP per class, {group.title}"
            views.append({"title": title, "labels": [labels[i] for i in inits], "lines": lines})
    return views


def precision_groups(groups: Sequence[Evaluated]) -> list[CurveGroup]:
    """Return, per table, precision over recall at each IoU: a mean over classes, then trials."""
    merged: dict[str, dict[str, list[tuple[str, Curve]]]] = {}
    for group in groups:
        found: dict[str, dict[str, list[list[float]]]] = {}
        recall: list[float] = []
        for init, evaluation in group.runs:
            for iou, precision in evaluation["precision"].items():
                if len(precision) == len(evaluation["recall"]) > 1:
                    recall = evaluation["recall"]
                    found.setdefault(iou, {}).setdefault(init, []).append(precision)
        for iou, by_init in found.items():
            key = f"{group.family} precision, IoU {float(iou):.2f}"
            merged.setdefault(group.title, {})[key] = [
                (init, [*zip(recall, map(statistics.fmean, zip(*trials)))])
                for init, trials in by_init.items()
            ]
    return [CurveGroup(title, curves, "recall") for title, curves in merged.items()]


def published_elsewhere(tables: Sequence[Table], names: Sequence[str]) -> list[PublishedTable]:
    """Return the published tables that stand beside none of ours: for orientation only."""
    reference = load_reference().tables
    beside = {(t.protocol, t.dataset, t.split) for t in tables if t.published}
    chosen = [reference[name] for name in names or reference]
    return [t for t in chosen if (t.protocol, t.dataset, t.split) not in beside]


def _group(
    title: str,
    runs: Sequence[tuple[str, dict[str, Curve]]],
    first: Sequence[str],
    last: Sequence[str],
) -> CurveGroup:
    """Return the curves of those keys, other losses between; what only repeats is left out."""
    present = dict.fromkeys(key for _, curves in runs for key in curves)
    others = [key for key in present if key.startswith("loss_") and key not in first]
    curves = {
        key: [(init, run[key]) for init, run in runs if len(run.get(key, [])) > 1]
        for key in (*first, *others, *last)
    }
    if curves.get("loss") == curves.get("loss_ce"):
        curves.pop("loss", None)
    return CurveGroup(title, {key: found for key, found in curves.items() if found})


def _mean(values: Sequence[float] | None) -> float | None:
    return statistics.fmean(values) if values else None


def _words(details: dict[str, Any], prefix: str = "") -> list[str]:
    """Return nested plain values as ``key value`` words."""
    words = []
    for key, value in details.items():
        if isinstance(value, dict):
            words += _words(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float | bool):
            words.append(f"{prefix}{key} {value}")
    return words
