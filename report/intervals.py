"""The interval of each Δ, from the ``bootstrap.jsonl`` that ``tools/compare.py`` writes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.config import InputError
from core.results import ResultRow, latest, read_rows
from report.tables import Line, Table, experiment_of

INTERVALS_FILE = "bootstrap.jsonl"
NEEDED = {"baseline", "compared", "interval", "level", "resamples"}  # of a row's details
ROUNDING = 1e-6  # percent points by which a Δ and its interval's own may differ


def read_intervals(folders: Iterable[str | Path]) -> tuple[ResultRow, ...]:
    """Return the rows of every ``bootstrap.jsonl`` in or below the folders, the newest of each.

    Raises:
        InputError: a row has no baseline, metric or interval.
    """
    files = {path for folder in folders for path in Path(folder).rglob(INTERVALS_FILE)}
    rows = []
    for file in sorted(files):
        for row in read_rows(file):
            if not row.details.keys() >= NEEDED:
                raise InputError(f"{file} has a row without interval: remove it, compare again")
            rows.append(row)
    return tuple(latest(sorted(rows, key=lambda row: row.time)))


def with_intervals(table: Table, rows: Sequence[ResultRow]) -> Table:
    """Return the table with the intervals that belong to its Δ, and what they mean in its notes.

    An interval belongs to a Δ when both are the same number of the same place: that of other
    detections or other trials is left out with a note.
    """
    place = (table.protocol, table.dataset, table.split, table.selection, table.baseline)
    own = [row for row in rows if (*_place(row), row.details["baseline"]) == place]
    if not own:
        return table
    lines, used, strange = [], [], []
    for line in table.lines:
        cells = dict(line.cells)
        for metric, cell in line.cells.items():
            found = [row for row in own if _is_of(row, line, metric)]
            fitting = [row for row in found if _same(row.value, cell.delta)]
            if fitting:
                low, high = fitting[-1].details["interval"]
                cells[metric] = dataclasses.replace(cell, interval=(low, high))
                used.append(fitting[-1])
            elif found and cell.delta is not None:
                strange.append(line.label)
        lines.append(dataclasses.replace(line, cells=cells))
    notes = [_meaning(used[0])] if used else []
    if strange:
        names = ", ".join(dict.fromkeys(strange))
        notes.append(
            f"Not shown: intervals of {names} that are of other detections or trials than the Δ "
            "here; tools/compare.py makes them anew."
        )
    return dataclasses.replace(table, lines=tuple(lines), notes=(*table.notes, *notes))


def _place(row: ResultRow) -> tuple[str, str, str, str]:
    return row.protocol, row.dataset, row.split, row.selection


def _is_of(row: ResultRow, line: Line, metric: str) -> bool:
    if not line.rows or row.details["compared"] != metric:
        return False
    first = line.rows[0]
    same = (row.init, row.epoch) == (line.init, first.epoch)
    experiment = experiment_of(first)._replace(code="")  # the interval may be of a later commit
    same = same and experiment_of(row)._replace(code="") == experiment
    return same and None not in row.details["interval"]


def _same(value: float | None, delta: float | None) -> bool:
    if value is None or delta is None:
        return False
    return math.isclose(value, delta, rel_tol=0, abs_tol=ROUNDING)


def _meaning(row: ResultRow) -> str:
    several = len(row.details.get("seeds", ())) > 1
    more = (
        " and of the pairs of trials of one seed"
        if several
        else "; the spread over seeds is not in it, since there is one trial"
    )
    return (
        f"In brackets: {100 * row.details['level']:g}% interval of Δ from "
        f"{row.details['resamples']:,} draws, with replacement, of the validation images (the same "
        f"for both sides){more}. * marks a Δ whose interval leaves 0 out; each interval stands "
        "alone, so that of twenty true zeros about one would be marked."
    )
