"""Tables from result rows: mean ± std over seeds, Δ to a baseline, published numbers beside them.

Only rows of equal step, protocol, dataset, split, selection and data share a table; only rows of
equal initialisation, pretraining epoch and ``core.identity.identity`` share a mean. No file is read
here.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from core.identity import DIGITS, UNKNOWN, Identity, identity
from core.results import ResultRow, latest
from report.reference import Place, Reference, Value, beside, load_reference

DETECTION_COLUMNS = (  # Table 5's columns
    "bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75",
)  # fmt: skip
STEP_ORDER = ("detection", "transfer", "analysis", "pretrain")
OTHER_COLUMNS = (  # shown where rows have them: LVIS's rare, common, frequent classes; keypoints
    "bbox/APr", "bbox/APc", "bbox/APf", "segm/APr", "segm/APc", "segm/APf",
    "keypoints/AP", "keypoints/AP50", "keypoints/AP75",
)  # fmt: skip
FAMILIES = {"bbox": "bbox", "segm": "mask", "keypoints": "keypoint"}
PLAIN_NAMES = {
    "top1": "top-1",
    "nmi": "NMI",
    "recall@1": "Recall@1",
    "mi_xt": "I(X;T)",
    "mi_ty": "I(T;Y)",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a table; the defaults suit rows of unknown origin."""

    baseline: str = "ce"  # the initialisation that every Δ refers to
    order: tuple[str, ...] = ()  # initialisations first to last; others follow as they appear
    labels: dict[str, str] = dataclasses.field(default_factory=dict)  # initialisation → label
    columns: tuple[str, ...] = ()  # metrics; empty: an AP table's for detection, all for the rest
    references: tuple[str, ...] = ()  # published tables by name that may stand beside; empty: any
    expected: dict[str, int] = dataclasses.field(default_factory=dict)  # init → trials planned


@dataclasses.dataclass(frozen=True)
class Cell:
    """One mean: its value, sample standard deviation (None for one trial), trials and Δ."""

    mean: float | None
    std: float | None
    trials: tuple[tuple[int, float], ...]  # (seed, value)
    delta: float | None = None  # mean − the baseline's mean; None for the baseline itself
    interval: tuple[float, float] | None = None  # of delta, where tools/compare.py has been run

    @property
    def is_real(self) -> bool:
        """Whether the interval of delta leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclasses.dataclass(frozen=True)
class Line:
    """One initialisation in one experiment: a row of the table."""

    init: str
    label: str
    cells: dict[str, Cell]
    seeds: tuple[int, ...]
    rows: tuple[ResultRow, ...]  # what it was made of
    marks: tuple[int, ...] = ()  # numbers of its footnotes


@dataclasses.dataclass(frozen=True)
class PublishedLine:
    """A published row fitted to the table's columns."""

    init: str
    label: str
    values: dict[str, Value]
    source: str
    pretraining: str
    marks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """A finished table; ``footnotes`` are numbered from 1, ``notes`` belong to it as a whole."""

    step: str
    protocol: str
    dataset: str
    split: str
    selection: str
    unit: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    published: tuple[PublishedLine, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]
    baseline: str
    data: str = ""  # their digest, where another table differs in nothing else
    name: str = ""  # of an overview, which joins tables of several protocols

    @property
    def title(self) -> str:
        """Return the protocol and the data in words."""
        if self.name:
            return self.name
        what = self.protocol or "source task after pretraining"
        more = f", data {self.data}" if self.data else ""
        return f"{what} on {self.dataset} ({self.split}){more}"

    @property
    def delta_columns(self) -> tuple[str, ...]:
        """Return the metrics that get a Δ column of their own: the APs, or else all.

        An overview has no room for them.
        """
        if self.name:
            return ()
        main = tuple(column for column in self.columns if column.endswith("/AP"))
        return main or self.columns

    @property
    def decimals(self) -> int:
        """Return 2 where a spread is known or all is below 10, else 1 (as published tables)."""
        cells = [cell for line in self.lines for cell in line.cells.values()]
        largest = max((abs(cell.mean) for cell in cells if cell.mean is not None), default=0.0)
        return 2 if largest < 10 or any(cell.std is not None for cell in cells) else 1


class _Footnotes:
    """Numbers sentences from 1; the same sentence keeps its number."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def mark(self, sentence: str) -> int:
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return self.sentences.index(sentence) + 1


def build_tables(
    rows: Iterable[ResultRow], options: Options | None = None, reference: Reference | None = None
) -> list[Table]:
    """Return one table per step, protocol, dataset, split, selection and data; detection first.

    Pretraining rows of one data set share a table, for there the recipes are what is compared: each
    has its line, with a footnote that names it.

    Args:
        rows: any rows; of repeated measurements the newest counts.
        options: order, baseline, columns; None for the defaults.
        reference: published tables; None for ``reference.yaml``.
    """
    options = options or Options()
    reference = reference or load_reference()
    groups: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in latest(rows):
        protocol = row.protocol if row.step != "pretrain" else ""  # there it is what is compared
        key = (row.step, protocol, row.dataset, row.split, row.selection, row.data)
        groups.setdefault(key, []).append(row)
    ranked = sorted(groups, key=lambda key: STEP_ORDER.index(key[0]))
    places = [place for *place, _ in groups]
    tables = []
    for *place, data in ranked:
        named = (data or "unknown") if places.count(place) > 1 else ""
        tables.append(_table(groups[*place, data], options, reference, named))
    return tables


def heading(metric: str, columns: Sequence[str] = ()) -> str:
    """Return a metric's column heading; AP50 stands alone where its family's AP is beside it."""
    family, slash, name = metric.partition("/")
    if not slash or family not in FAMILIES:
        return PLAIN_NAMES.get(metric, metric)
    if name != "AP" and f"{family}/AP" in columns:
        return name
    return f"{name}^{FAMILIES[family]}"


def experiment_of(row: ResultRow) -> Identity:
    """Return what must be equal for two rows to share a mean or to be compared, in any metric."""
    return identity(row)._replace(metric="")


def overrides_of(row: ResultRow) -> str:
    """Return the keys in which a run left its named protocol, as ``KEY VALUE`` text."""
    overrides = row.details.get("overrides")
    if not isinstance(overrides, dict):
        return ""
    return ", ".join(f"{key} {value}" for key, value in overrides.items())


def _table(rows: list[ResultRow], options: Options, reference: Reference, data: str = "") -> Table:
    first = rows[0]
    columns = options.columns or _default_columns(rows)
    footnotes = _Footnotes()
    lines = _sorted(_lines(rows, columns, options, footnotes), options.order)
    lines = [_with_delta(line, lines, columns, options.baseline, footnotes) for line in lines]
    if data:
        said = f"Data {data} (learned from/evaluated on); others of this name: in another table."
        mark = footnotes.mark(said)
        lines = [dataclasses.replace(line, marks=(*line.marks, mark)) for line in lines]
    if first.step != "pretrain":  # given weights have no pretraining to be missing
        lines = _note_trials(lines, options, footnotes)
    published, why_not = _published(first, columns, options, reference, footnotes)
    protocol = first.protocol if first.step != "pretrain" else ""
    notes = [f"{first.protocol} changes {text}." for text in [overrides_of(first)] if text]
    if not any(identity(row).known for row in rows):
        notes.append(f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}; never averaged with later rows.")
    if not any(line.init == options.baseline for line in lines):
        notes.append(f"No Δ: the baseline {options.baseline!r} has no rows here.")
    if any(len(line.seeds) > 1 for line in lines):
        notes.append("Mean ± sample standard deviation over seeds.")
    elif lines:
        notes.append(
            "One trial per row: the spread over seeds is not known, differences may be noise."
        )
    notes += reference.protocol_notes.get((first.dataset, first.protocol), ())
    if why_not:
        notes.append(why_not)
    return Table(
        step=first.step,
        protocol=protocol,
        dataset=first.dataset,
        split=first.split,
        selection=first.selection,
        unit=first.unit,
        columns=tuple(columns),
        lines=tuple(lines),
        published=published,
        footnotes=tuple(footnotes.sentences),
        notes=tuple(notes),
        baseline=options.baseline,
        data=data,
    )


def _default_columns(rows: list[ResultRow]) -> tuple[str, ...]:
    """Return Table 5's columns and those of other tasks for detection, all metrics for the rest."""
    present = tuple(dict.fromkeys(row.metric for row in rows))
    if rows[0].step != "detection":
        return present
    families = {metric.split("/")[0] for metric in present}
    chosen = [c for c in DETECTION_COLUMNS if c.split("/")[0] in families]
    chosen += [c for c in OTHER_COLUMNS if c in present]
    rank = list(FAMILIES)
    return tuple(sorted(chosen, key=lambda c: rank.index(c.split("/")[0]))) or present


def _lines(
    rows: list[ResultRow], columns: Sequence[str], options: Options, footnotes: _Footnotes
) -> list[Line]:
    """Group rows that may share a mean, and footnote the differences between groups."""
    groups: dict[tuple[str, int | None, Identity], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.init, row.epoch, experiment_of(row)), []).append(row)
    experiments = {experiment for _, _, experiment in groups}
    lines = []
    for (init, epoch, experiment), group in groups.items():
        label = options.labels.get(init) or init
        if len({key[1] for key in groups if key[0] == init}) > 1:
            label += f", epoch {epoch}"
        kept, repeated = _one_per_seed(group)
        said = [*_apart(experiment, experiments), *_of_fits(kept)]
        if repeated:
            seeds = ", ".join(map(str, repeated))
            said.append(f"Measured more than once for seed {seeds}: the newest weights count.")
        marks = [footnotes.mark(sentence) for sentence in said]
        cells = {metric: _mean([r for r in kept if r.metric == metric]) for metric in columns}
        seeds_seen = tuple(sorted({row.seed for row in kept}))
        lines.append(Line(init, label, cells, seeds_seen, tuple(kept), tuple(marks)))
    return lines


def _apart(own: Identity, all_of_table: set[Identity]) -> list[str]:
    """Return the differences of an experiment from the others of its table, in sentences."""
    said = []
    if len({other.protocol for other in all_of_table}) > 1:
        said.append(f"Recipe {own.protocol}.")
    alike = {other for other in all_of_table if other.protocol == own.protocol}
    if len({other.known for other in alike}) > 1 and not own.known:
        said.append(f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}.")
    if len({other.version for other in alike if other.known}) > 1 and own.known:
        said.append(f"Version {own.version} of the protocol.")
    if len({other.config for other in alike}) > 1:
        recipe = own.config[:DIGITS] or "unknown"
        said.append(f"Measured with recipe {recipe}; different recipes are never averaged.")
    if len({other.code for other in alike if not other.known}) > 1 and not own.known:
        code = short_code(own.code)
        said.append(f"Measured with code {code}; different code is never averaged.")
    return said


def _of_fits(rows: Sequence[ResultRow]) -> list[str]:
    """Return warnings about the fits of linear probes, in sentences."""
    edge = sorted({row.seed for row in rows if row.details.get("at_grid_edge")})
    cut = sorted({row.seed for row in rows if row.details.get("converged") is False})
    said = []
    if edge:
        said.append(
            f"C was chosen at the edge of its grid (seed {', '.join(map(str, edge))}): widen "
            "linear.log10_c_min or linear.log10_c_max."
        )
    if cut:
        said.append(
            f"The fit ended at linear.iterations before it converged (seed "
            f"{', '.join(map(str, cut))})."
        )
    return said


def _one_per_seed(rows: list[ResultRow]) -> tuple[list[ResultRow], list[int]]:
    """Keep the rows of the newest weights of each seed; also return the seeds with several."""
    kept, repeated = [], []
    for seed in dict.fromkeys(row.seed for row in rows):
        own = [row for row in rows if row.seed == seed]
        newest = max(own, key=lambda row: row.time).weights
        kept += [row for row in own if row.weights == newest]
        if len({row.weights for row in own}) > 1:
            repeated.append(seed)
    return kept, sorted(repeated)


def _mean(rows: list[ResultRow]) -> Cell:
    trials = sorted((row.seed, row.value) for row in rows if row.value is not None)
    values = [value for _, value in trials]
    if not values:
        return Cell(None, None, ())
    std = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), std, tuple(trials))


def _sorted(lines: list[Line], order: Sequence[str]) -> list[Line]:
    rank = {init: position for position, init in enumerate(order)}
    return sorted(lines, key=lambda line: rank.get(line.init, len(rank)))  # stable


def _with_delta(
    line: Line, lines: list[Line], columns: Sequence[str], baseline: str, footnotes: _Footnotes
) -> Line:
    """Fill in Δ against the baseline of the same experiment, else the last one, marked."""
    candidates = [other for other in lines if other.init == baseline]
    if not candidates or line.init == baseline:
        return line
    same = [other for other in candidates if _compared(other) == _compared(line)]
    base = (same or candidates)[-1]
    marks = line.marks
    if not same:
        marks += (footnotes.mark("Its Δ compares different recipes or code."),)
    cells = {}
    for metric in columns:
        own, other = line.cells[metric], base.cells[metric]
        known = own.mean is not None and other.mean is not None
        delta = own.mean - other.mean if known else None  # type: ignore[operator]
        cells[metric] = dataclasses.replace(own, delta=delta)
    return dataclasses.replace(line, cells=cells, marks=marks)


def _compared(line: Line) -> Identity:
    """Return what two lines must share for their Δ to be of the initialisation alone."""
    experiment = experiment_of(line.rows[0])
    if experiment.step == "pretrain":  # the recipe is what is compared there
        return experiment._replace(protocol="", config="", version=min(experiment.version, 1))
    return experiment


def _note_trials(lines: list[Line], options: Options, footnotes: _Footnotes) -> list[Line]:
    """Mark lines with fewer trials than planned; add an empty line where there is none at all."""
    noted = []
    for line in lines:
        total = len({seed for other in lines if other.init == line.init for seed in other.seeds})
        planned = options.expected.get(line.init, 0)
        if total < planned:
            mark = footnotes.mark(f"{total} of {planned} trials so far.")
            line = dataclasses.replace(line, marks=(*line.marks, mark))
        noted.append(line)
    columns = list(lines[0].cells)
    for init, planned in options.expected.items():
        if planned and not any(line.init == init for line in lines):
            mark = footnotes.mark("Not measured (yet).")
            empty = {metric: Cell(None, None, ()) for metric in columns}
            noted.append(Line(init, options.labels.get(init) or init, empty, (), (), (mark,)))
    return _sorted(noted, options.order)


def _published(
    first: ResultRow,
    columns: Sequence[str],
    options: Options,
    reference: Reference,
    footnotes: _Footnotes,
) -> tuple[tuple[PublishedLine, ...], str]:
    """Return the published lines of the same protocol, dataset and split, or why there are none."""
    place = Place(first.step, first.protocol, first.dataset, first.split)
    pairs, why_not = beside(place, reference, options.references)
    lines = []
    for table, row in pairs:
        values = {c.metric: v for c, v in zip(table.columns, row.values, strict=True)}
        fitted = {metric: values.get(metric) for metric in columns}
        marks = (footnotes.mark(f"Published: {row.note}."),) if row.note else ()
        line = PublishedLine(row.init, row.label, fitted, row.source, row.pretraining, marks)
        lines.append(line)
    return tuple(lines), why_not


def short_code(code: str) -> str:
    """Return a git commit in 8 characters, saying so where the work tree differed from it."""
    if not code:
        return "unknown"
    commit, _, dirty = code.partition("+")
    return commit[:8] + (" with uncommitted changes" if dirty else "")
