"""What a page shows beside its tables: curves, provenance, classes, published numbers."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from core.results import ResultRow, latest
from report.reference import PublishedTable, load_reference
from report.runs import Curve, Run
from report.tables import FAMILIES, Table

PRETRAIN_CURVES = ("loss", "loss_ce", "loss_ias", "loss_ips", "top1")  # then any other loss_*
DETECTION_CURVES = ("total_loss", "loss_cls", "loss_box_reg", "loss_mask")


@dataclasses.dataclass(frozen=True)
class CurveGroup:
    """Curves that share a legend: per logged key, (initialisation, curve) of every run."""

    title: str
    curves: dict[str, list[tuple[str, Curve]]]


def curve_groups(runs: Sequence[Run]) -> list[CurveGroup]:
    """Return the curves of pretraining, then those of each detection protocol."""
    pretraining = [(run.init, run.pretrain) for run in runs]
    present = dict.fromkeys(key for _, curves in pretraining for key in curves)
    others = [k for k in present if k.startswith("loss_") and k not in PRETRAIN_CURVES]
    groups = [_group("Pretraining", pretraining, [*PRETRAIN_CURVES, *others])]
    protocols: dict[str, list[tuple[str, dict[str, Curve]]]] = {}
    for run in runs:
        if run.detection:
            name = run.rows[0].protocol if run.rows else run.path.parent.name
            protocols.setdefault(name, []).append((run.init, run.detection))
    groups += [_group(f"Detection, {n}", c, DETECTION_CURVES) for n, c in protocols.items()]
    return [group for group in groups if group.curves]


def provenance(runs: Sequence[Run], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return one entry per run, measurement place and weights: where its rows come from."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for row in latest(run.rows):
            key = (
                run.path,
                row.protocol,
                row.dataset,
                row.split,
                row.weights,
                row.config,
                row.code,
            )
            if key not in entries:
                entries[key] = {
                    "row": row,
                    "label": labels.get(row.init, row.init),
                    "run": f"{run.path.parent.name}/{run.path.name}",
                    "details": ", ".join(_words(row.details)),
                    "count": 0,
                }
            entries[key]["count"] += 1
    return list(entries.values())


def class_tables(
    runs: Sequence[Run], tables: Sequence[Table], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Return AP per class (metrics ``bbox/AP-<class>``) of every table whose runs have it."""
    views = []
    rows = latest(row for run in runs for row in run.rows)
    for table in tables:
        place = (table.step, table.protocol, table.dataset, table.split, table.selection)
        for family in ("bbox", "segm"):
            prefix = f"{family}/AP-"
            own = [
                row
                for row in rows
                if (row.step, row.protocol, row.dataset, row.split, row.selection) == place
                and row.metric.startswith(prefix)
            ]
            if own:
                title = f"{FAMILIES[family]} AP per class, {table.title}"
                views.append(_class_table(title, own, prefix, labels))
    return views


def published_elsewhere(tables: Sequence[Table], names: Sequence[str]) -> list[PublishedTable]:
    """Return the published tables that stand beside none of ours: for orientation only."""
    reference = load_reference().tables
    beside = {(t.protocol, t.dataset, t.split) for t in tables if t.published}
    chosen = [reference[name] for name in names or reference]
    return [t for t in chosen if (t.protocol, t.dataset, t.split) not in beside]


def _group(
    title: str, runs: Sequence[tuple[str, dict[str, Curve]]], keys: Sequence[str]
) -> CurveGroup:
    """Return the curves of those keys; one that only repeats another is left out."""
    curves = {
        key: [(init, run[key]) for init, run in runs if len(run.get(key, [])) > 1] for key in keys
    }
    if curves.get("loss") == curves.get("loss_ce"):
        curves.pop("loss", None)
    return CurveGroup(title, {key: found for key, found in curves.items() if found})


def _class_table(
    title: str, rows: Sequence[ResultRow], prefix: str, labels: dict[str, str]
) -> dict[str, Any]:
    """Return the mean over seeds per class and initialisation."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found = values.setdefault((row.metric.removeprefix(prefix), row.init), [])
        if row.value is not None:
            found.append(row.value)
    present = {init for _, init in values}
    inits = [init for init in labels if init in present]
    lines = []
    for name in dict.fromkeys(name for name, _ in values):
        found_by_init = [values.get((name, init)) for init in inits]
        lines.append((name, [statistics.fmean(v) if v else None for v in found_by_init]))
    return {"title": title, "labels": [labels[init] for init in inits], "lines": lines}


def _words(details: dict[str, Any], prefix: str = "") -> list[str]:
    """Return nested plain values as ``key value`` words."""
    words = []
    for key, value in details.items():
        if isinstance(value, dict):
            words += _words(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float | bool):
            words.append(f"{prefix}{key} {value}")
    return words
