"""Published numbers (``reference.yaml``), each row with its source, protocol and data."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import InputError, read_yaml

REFERENCE_FILE = Path(__file__).with_name("reference.yaml")

Value = float | tuple[float, float] | None  # a number, a range, or not given


@dataclasses.dataclass(frozen=True)
class PublishedColumn:
    """One column of a published table; its data and recipe stand here where columns differ."""

    metric: str
    dataset: str
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One published row: never averaged with ours, beside only where protocol and data agree."""

    init: str
    label: str
    values: tuple[Value, ...]  # one per column of its table
    protocol: str  # "" where the recipe is not published
    dataset: str
    split: str
    pretraining: str
    source: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """One published table and the notes that must be printed with it."""

    name: str
    title: str
    step: str
    protocol: str
    dataset: str
    split: str
    unit: str
    source: str
    columns: tuple[PublishedColumn, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Reference:
    """All published tables by name, and the notes that belong to a protocol on a dataset."""

    tables: dict[str, PublishedTable]
    protocol_notes: dict[tuple[str, str], tuple[str, ...]]  # (dataset, protocol) → notes


@dataclasses.dataclass(frozen=True)
class Place:
    """The fields that a measurement and a published row must share to stand in one table."""

    step: str
    protocol: str
    dataset: str
    split: str


@functools.cache
def load_reference(path: Path = REFERENCE_FILE) -> Reference:
    """Read the published numbers.

    Raises:
        InputError: a table lacks a key, a row has not one value per column, or a note is unknown.
    """
    content = read_yaml(path)
    notes: dict[str, str] = content.get("notes", {})
    try:
        tables = {
            name: _table(name, table, notes) for name, table in content.get("tables", {}).items()
        }
        protocol_notes = {
            (entry["dataset"], entry["protocol"]): tuple(notes[note] for note in entry["notes"])
            for entry in content.get("protocol_notes", [])
        }
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return Reference(tables, protocol_notes)


def beside(
    place: Place, reference: Reference, names: Sequence[str] = ()
) -> tuple[list[tuple[PublishedTable, PublishedRow]], str]:
    """Return the published rows of exactly this place, or none and the reason in a sentence.

    Args:
        names: the published tables to look in; empty for all.
    """
    tables = [t for n in names or reference.tables if (t := reference.tables[n]).step == place.step]
    pairs = [
        (table, row)
        for table in tables
        for row in table.rows
        if row.protocol and Place(table.step, row.protocol, row.dataset, row.split) == place
    ]
    if pairs or not tables:
        return pairs, ""
    where: dict[str, list[str]] = {}
    for table in tables:
        data = f"on {table.dataset} ({table.split})" if table.dataset else "on other data"
        where.setdefault(data, []).append(table.protocol or "a recipe that is not published")
    known = "; ".join(f"{', '.join(dict.fromkeys(n))} {data}" for data, n in where.items())
    return [], (
        f"No published numbers stand beside this table: none are of {place.protocol} on "
        f"{place.dataset} ({place.split}). Known ones are of {known}."
    )


def _table(name: str, content: dict[str, Any], notes: dict[str, str]) -> PublishedTable:
    columns = tuple(
        PublishedColumn(column, content["dataset"])
        if isinstance(column, str)
        else PublishedColumn(
            column["metric"], column.get("dataset") or content["dataset"], column.get("heading", "")
        )
        for column in content["columns"]
    )
    inherited = {
        key: content.get(key, "")
        for key in ("protocol", "dataset", "split", "pretraining", "source")
    }
    rows = []
    for row in content["rows"]:
        if len(row["values"]) != len(columns):
            raise ValueError(f"row {row['label']!r} of {name} needs {len(columns)} values")
        values = tuple(tuple(v) if isinstance(v, list) else v for v in row["values"])
        rows.append(PublishedRow(**{**inherited, **row, "values": values}))
    return PublishedTable(
        name=name,
        title=content["title"],
        step=content["step"],
        protocol=content["protocol"],
        dataset=content.get("dataset", ""),
        split=content["split"],
        unit=content["unit"],
        source=content["source"],
        columns=columns,
        rows=tuple(rows),
        notes=tuple(notes[note] for note in content["notes"]),
    )
