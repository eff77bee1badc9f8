"""Several tables as one: a row for each initialisation, a column for each thing that was measured.

The tables stay what they are, with their Δ, trials, published rows and notes; an overview repeats
their means side by side. Detection, linear probes, fine-tuning and the source task share one; k-NN
and few-shot figures, which come in dozens, share another.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from core.identity import Identity
from report.tables import Cell, Line, Options, Table, experiment_of

UNIT = "%"
MARKS = {"linear": "†", "finetune": "‡"}
SPELLED = {r"knn_(\d+)": r"\1-NN", r"few_shot_(\d+)": r"\1-shot"}
AP_NAMES = {  # metric → its short heading, its name in a longer one
    "bbox/AP": ("AP^bbox", "box AP"),
    "segm/AP": ("AP^mask", "mask AP"),
    "keypoints/AP": ("AP^keypoint", "keypoint AP"),
}
MARK_NOTE = "† linear classifier on frozen features; ‡ fine-tuned."
DETAILS_NOTE = "Differences, trials and published numbers: in the tables of each column below."


@dataclasses.dataclass(frozen=True)
class _Column:
    """A metric of a table."""

    table: Table
    metric: str

    @property
    def family(self) -> str:
        """Return the protocol without what follows its method: ``linear`` for ``linear_64px``."""
        known = [*MARKS, *SPELLED]
        found = (re.match(rf"(?:{name})(?![^_+])", self.table.protocol) for name in known)
        return next((match[0] for match in found if match), self.table.protocol)

    def short(self) -> str:
        """Return the protocol with its method spelled out: ``† 64px`` for ``linear_64px``."""
        what = MARKS.get(self.family, self.family)
        for pattern, spelled in SPELLED.items():
            what = re.sub(rf"^{pattern}$", spelled, what)
        return f"{what} {self.table.protocol[len(self.family) :].lstrip('_')}".rstrip()

    @property
    def is_minor(self) -> bool:
        """Whether it is a k-NN or few-shot figure."""
        return any(re.fullmatch(pattern, self.family) for pattern in SPELLED)

    def names(self) -> list[str]:
        """Return its headings, from the shortest to the one that nothing else can have."""
        table = self.table
        if table.step == "detection":
            short, plain = AP_NAMES.get(self.metric, (self.metric, self.metric))
            long = [plain, table.dataset, table.protocol, table.split, table.selection]
            long += [f"data {table.data}"] if table.data else []
            return [short, *(" ".join(long[:n]) for n in range(2, len(long) + 1))]
        what = "source" if table.step == "pretrain" else self.short()
        metric = "" if self.metric == "top1" else f" {self.metric}"
        short = f"{table.dataset} {what}{metric}"
        long = [f"{table.dataset} {table.protocol}{metric}", table.split, table.selection]
        long += [f"data {table.data}"] if table.data else []
        return [short, *(" ".join(long[:n]) for n in range(1, len(long) + 1))]


def overviews(tables: Sequence[Table], options: Options) -> list[Table]:
    """Return the tables that join others: none where a kind has a single table."""
    columns = [_Column(t, m) for t in tables if t.unit == UNIT for m in t.delta_columns]
    evaluated = [c for c in columns if c.table.step in ("detection", "transfer")]
    source = [c for c in columns if c.table.step == "pretrain" and c.metric == "top1"]
    kinds: list[tuple[str, Callable[[_Column], bool], list[_Column]]] = [
        ("All initialisations", lambda column: not column.is_minor, source),
        ("k-NN and few-shot on frozen features", lambda column: column.is_minor, []),
    ]
    joined = []
    for name, belongs, more in kinds:
        chosen = [column for column in evaluated if belongs(column)]
        if len({id(column.table) for column in chosen}) > 1:
            joined.append(_join(name, [*chosen, *more], options))
    return joined


def _join(name: str, columns: Sequence[_Column], options: Options) -> Table:
    headings = _headings(columns)
    order = [*options.order, *(line.init for column in columns for line in column.table.lines)]
    lines, several = [], False
    chosen = [_chosen(column) for column in columns]
    for init in dict.fromkeys(order):
        measured = [[ln for ln in c.table.lines if ln.init == init and ln.rows] for c in columns]
        found = [
            [line for line in own if wanted in (None, experiment_of(line.rows[0]))]
            for own, wanted in zip(measured, chosen, strict=True)
        ]
        several = several or any(len(own) > 1 for own in measured)
        newest = [max(own, key=_time, default=None) for own in found]
        if not any(newest):
            continue
        cells = {
            heading: line.cells[column.metric] if line else Cell(None, None, ())
            for heading, column, line in zip(headings, columns, newest, strict=True)
        }
        rows = tuple(row for line in newest if line for row in line.rows)
        seeds = tuple(sorted({seed for cell in cells.values() for seed, _ in cell.trials}))
        lines.append(Line(init, options.labels.get(init) or init, cells, seeds, rows))
    return Table(
        step="overview", protocol="", dataset="", split="", selection="", unit=UNIT,
        columns=tuple(headings), lines=tuple(lines), published=(), footnotes=(),
        notes=tuple(_notes(headings, lines, several)), baseline=options.baseline, name=name,
    )  # fmt: skip


def _chosen(column: _Column) -> Identity | None:
    """Return the experiment that most initialisations of a column have, of equals the newest.

    None for source tasks, where each initialisation has a recipe of its own.
    """
    if column.table.step == "pretrain":
        return None
    found: dict[Identity, list[Line]] = {}
    for line in column.table.lines:
        if line.rows:
            found.setdefault(experiment_of(line.rows[0]), []).append(line)
    return max(
        found, key=lambda one: (len({ln.init for ln in found[one]}), max(map(_time, found[one])))
    )


def _notes(headings: Sequence[str], lines: Sequence[Line], several: bool) -> list[str]:
    notes = [MARK_NOTE] if any(mark in h for h in headings for mark in MARKS.values()) else []
    if any(len(line.seeds) > 1 for line in lines):
        notes.append("Mean ± sample standard deviation over seeds.")
    cells = [(line, cell) for line in lines for cell in line.cells.values()]
    if any(cell.mean is None for _, cell in cells):
        notes.append("–: not measured.")
    if any(0 < len(cell.trials) < len(line.seeds) for line, cell in cells):
        notes.append("Not every column has every trial.")
    if several:
        notes.append(
            "Measured in several ways: a column shows the recipe that most initialisations have, "
            "else the newest."
        )
    return [*notes, DETAILS_NOTE]


def _headings(columns: Sequence[_Column]) -> list[str]:
    """Return the shortest headings that tell the columns apart."""
    names = [column.names() for column in columns]
    chosen = [0] * len(names)
    while True:
        headings = [own[n] for own, n in zip(names, chosen, strict=True)]
        alike = [i for i, heading in enumerate(headings) if headings.count(heading) > 1]
        longer = [i for i in alike if chosen[i] + 1 < len(names[i])]
        if not longer:
            return [f"{h} ({i + 1})" if i in alike else h for i, h in enumerate(headings)]
        for i in longer:
            chosen[i] += 1


def _time(line: Line) -> str:
    return max((row.time for row in line.rows), default="")
