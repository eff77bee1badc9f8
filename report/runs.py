"""Run folders as a report reads them: rows, curves, config, detections; nothing is required."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.config import InputError
from core.results import ROWS_FILE, ResultRow, is_set_aside, read_rows

LOG, METRICS = "log.jsonl", "metrics.json"
DETECTIONS = ("coco_instances_results.json", "inference/coco_instances_results.json")
EVALUATIONS = ("coco_metrics.json", "inference/coco_metrics.json")
CONFIGS = ("config.yaml", "config.json")

Curve = list[tuple[float, float]]  # (x, value), ascending in x


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder; what it lacks is empty or None."""

    path: Path
    rows: tuple[ResultRow, ...]
    pretrain: dict[str, Curve]  # from log.jsonl: "loss", "loss_ce", … over iterations
    detection: dict[str, Curve]  # from metrics.json: "total_loss", …
    config: str  # the resolved config, as text
    dataset: dict[str, Any] | None  # {"json", "images", "classes"} of the evaluated images
    detections: Path | None  # coco_instances_results.json
    evaluation: dict[str, Any]  # coco_metrics.json: per task, AP per class and curves

    @property
    def init(self) -> str:
        """Return the initialisation: from the rows, else from a folder named ``<init>-s<seed>``."""
        if self.rows:
            return self.rows[0].init
        return self.path.name.rsplit("-s", 1)[0]

    @property
    def seed(self) -> int | None:
        """Return the seed: from the rows, else from the folder's name."""
        if self.rows:
            return self.rows[0].seed
        match = re.search(r"-s(\d+)$", self.path.name)
        return int(match[1]) if match else None


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Return every run in or below ``folders``; set-aside ones (``*.old1``) are left out.

    Raises:
        InputError: a folder does not exist, or none of them holds a run.
    """
    paths: dict[Path, None] = {}
    roots = [Path(folder) for folder in folders]
    for folder in roots:
        if not folder.is_dir():
            raise InputError(f"run folder {folder} does not exist")
        for name in (ROWS_FILE, LOG, METRICS):
            for file in sorted(folder.rglob(name)):
                if not is_set_aside(file.parent, folder):
                    paths[file.parent] = None
    if not paths:
        places = ", ".join(map(str, roots))
        files = f"{ROWS_FILE}, {LOG} or {METRICS}"
        raise InputError(f"no {files} in or below {places}: no runs to report")
    return [read_run(path) for path in sorted(paths)]


def read_run(folder: str | Path) -> Run:
    """Read one run folder."""
    path = Path(folder)
    rows = tuple(read_rows(path / ROWS_FILE)) if (path / ROWS_FILE).is_file() else ()
    config = next((path / name for name in CONFIGS if (path / name).is_file()), None)
    return Run(
        path=path,
        rows=rows,
        pretrain=read_curves(path / LOG),
        detection=read_curves(path / METRICS),
        config=config.read_text(encoding="utf-8", errors="replace") if config else "",
        dataset=_read_dataset(path / "dataset.json"),
        detections=next((path / name for name in DETECTIONS if (path / name).is_file()), None),
        evaluation=next(
            (_read_evaluation(path / name) for name in EVALUATIONS if (path / name).is_file()), {}
        ),
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """Read a JSON-lines log into one curve per key over ``iteration``.

    A resumed run repeats iterations: the later line counts. Unfinished lines and values that are
    not finite numbers are skipped.
    """
    if not path.is_file():
        return {}
    points: dict[str, dict[float, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
            x = float(content["iteration"])
        except (ValueError, TypeError, KeyError):
            continue
        for key, value in content.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "iteration" and number and math.isfinite(value):
                points.setdefault(key, {})[x] = float(value)
    return {key: sorted(curve.items()) for key, curve in points.items()}


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Return the tasks of coco_metrics.json that have classes and curves."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    wanted = {"per_class", "recall", "precision"}
    return {k: v for k, v in content.items() if isinstance(v, dict) and wanted <= v.keys()}


def _read_dataset(path: Path) -> dict[str, Any] | None:
    """Return the content of dataset.json, None where it is missing or malformed."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    complete = isinstance(content, dict) and {"json", "images"} <= content.keys()
    return content if complete else None
