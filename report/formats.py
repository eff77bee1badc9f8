"""A finished table as markdown, LaTeX (booktabs) or CSV; strings in, strings out."""

import csv
import io
import re

from tabulate import tabulate

from report.reference import Value
from report.tables import Cell, Line, Table, experiment_of, heading, short_code

DASH = "–"
MINUS = "−"
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
LATEX_SPECIALS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}",
    "]": "{]}",
    "±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "−": r"$-$", "†": r"\dag{}",
    "‡": r"\ddag{}", "…": r"\ldots{}", "–": "--", "α": r"$\alpha$", "β": r"$\beta$",
    "τ": r"$\tau$",
}  # fmt: skip


def number(value: float | None, decimals: int) -> str:
    """Return a number with a typographic minus, a dash for None."""
    return DASH if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int) -> str:
    """Return a difference with its sign; what rounds to zero has none."""
    if value is None:
        return ""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def interval(cell: Cell, decimals: int) -> str:
    """Return the interval of a Δ in brackets, with a star where it leaves 0 out; "" for none."""
    if cell.interval is None:
        return ""
    low, high = (f"{end:+.{decimals}f}".replace("-", MINUS) for end in cell.interval)
    return f"[{low}, {high}]" + ("*" if cell.is_real else "")


def spread(cell: Cell, decimals: int) -> str:
    """Return ``mean ± std``, or the mean alone where there was one trial."""
    text = number(cell.mean, decimals)
    return text if cell.std is None else f"{text} ± {number(cell.std, decimals)}"


def published_value(value: Value) -> str:
    """Return a published value as it was given: one decimal, a range with an ellipsis."""
    if isinstance(value, tuple):
        return "…".join(number(end, 1) for end in value)
    return number(value, 1)


def trials(line: Line) -> str:
    """Return the number of trials, with their seeds where there are several."""
    count = len(line.seeds)
    return f"{count} (seeds {', '.join(map(str, line.seeds))})" if count > 1 else str(count)


def each_trial(cell: Cell, decimals: int) -> str:
    """Return what each trial gave, by seed."""
    return ", ".join(f"seed {seed}: {number(value, decimals)}" for seed, value in cell.trials)


def code_note(table: Table) -> str:
    """Return which code measured the table."""
    codes = sorted({short_code(row.code) for line in table.lines for row in line.rows})
    return f"Code {', '.join(codes)}." if codes else ""


def to_markdown(table: Table) -> str:
    """Return the table as a markdown section: title, pipe table, footnotes, notes."""
    places = table.decimals
    heads = ["initialisation", *(heading(c, table.columns) for c in table.columns)]
    heads += [f"Δ {heading(c, table.columns)}" for c in table.delta_columns] + ["trials"]
    body = [
        [
            line.label + _marks(line.marks),
            *(spread(line.cells[c], places) for c in table.columns),
            *(_delta(line, c, table) for c in table.delta_columns),
            trials(line),
        ]
        for line in table.lines
    ]
    body += [
        [
            f"published: {line.label}{_marks(line.marks)}",
            *(published_value(line.values[c]) for c in table.columns),
            *("" for _ in table.delta_columns),
            "",
        ]
        for line in table.published
    ]
    aligned = ["left", *["right"] * (len(heads) - 1)]
    cells = [[_markdown_text(text) for text in row] for row in body]
    pipe = tabulate(cells, heads, "pipe", disable_numparse=True, colalign=aligned)
    parts = [f"### {_markdown_text(table.title)}, in {table.unit}", pipe]
    notes = [f"{n}. {_markdown_text(text)}" for n, text in enumerate(table.footnotes, 1)]
    if notes:
        parts.append("\n".join(notes))
    parts += [_markdown_text(note) for note in _all_notes(table)]
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    """Return a booktabs table environment; every text is escaped."""
    places = table.decimals
    heads = ["Initialisation", *(_latex_heading(c, table.columns) for c in table.columns)]
    heads += [rf"$\Delta$ {_latex_heading(c, table.columns)}" for c in table.delta_columns]
    heads += ["Trials"]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_text(table.title)}, in {latex_text(table.unit)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(heads)} \\\\",
        r"    \midrule",
    ]
    for line in table.lines:
        cells = [
            latex_text(line.label) + _latex_marks(line.marks),
            *(latex_text(spread(line.cells[c], places)) for c in table.columns),
            *(latex_text(_delta(line, c, table)) for c in table.delta_columns),
            str(len(line.seeds)),
        ]
        lines.append(f"    {' & '.join(cells)} \\\\")
    if table.published:
        lines.append(r"    \midrule")
    for published in table.published:
        cells = [
            latex_text(f"published: {published.label}") + _latex_marks(published.marks),
            *(latex_text(published_value(published.values[c])) for c in table.columns),
            *("" for _ in table.delta_columns),
            "",
        ]
        lines.append(f"    {' & '.join(cells)} \\\\")
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    notes = [f"{_latex_marks((n,))} {latex_text(t)}" for n, t in enumerate(table.footnotes, 1)]
    notes += [latex_text(note) for note in _all_notes(table)]
    if notes:
        lines += [r"  \par\medskip", r"  \begin{minipage}{\linewidth}\footnotesize"]
        lines += [f"    {note}\\par" for note in notes]
        lines += [r"  \end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_csv(tables: list[Table]) -> str:
    """Return all tables as one CSV: a line per initialisation and metric, unrounded numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["kind", "step", "protocol", "dataset", "split", "selection", "initialisation", "metric",
         "unit", "mean", "std", "trials", "seeds", "delta", "delta_low", "delta_high", "baseline",
         "recipe", "version", "data", "code", "source", "notes"]
    )  # fmt: skip
    for table in tables:
        place = [table.step, table.protocol, table.dataset, table.split, table.selection]
        for line in table.lines:
            own = experiment_of(line.rows[0]) if line.rows else None
            identity = [own.config, own.version or "", own.data] if own else ["", "", ""]
            code = " ".join(sorted({row.code for row in line.rows}))
            notes = " ".join(table.footnotes[mark - 1] for mark in line.marks)
            for metric in table.columns:
                cell = line.cells[metric]
                seeds = " ".join(str(seed) for seed, _ in cell.trials)
                writer.writerow(
                    ["measured", *place, line.init, metric, table.unit, _csv(cell.mean),
                     _csv(cell.std), len(cell.trials), seeds, _csv(cell.delta),
                     *map(_csv, cell.interval or (None, None)), table.baseline, *identity, code,
                     "", notes]
                )  # fmt: skip
        for published in table.published:
            notes = " ".join(table.footnotes[mark - 1] for mark in published.marks)
            for metric in table.columns:
                value = published.values[metric]
                text = "…".join(map(str, value)) if isinstance(value, tuple) else _csv(value)
                writer.writerow(
                    ["published", *place, published.init, metric, table.unit, text,
                     *[""] * 11, published.source, notes]
                )  # fmt: skip
    return buffer.getvalue()


def to_wide_csv(table: Table) -> str:
    """Return one table as a CSV with a line per initialisation, mean and std of each column."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [f"{column}{more}" for column in table.columns for more in ("", " std")]
    writer.writerow(["initialisation", "label", *heads, "trials"])
    for line in table.lines:
        cells = [line.cells[column] for column in table.columns]
        values = [_csv(value) for cell in cells for value in (cell.mean, cell.std)]
        writer.writerow([line.init, line.label, *values, len(line.seeds)])
    return buffer.getvalue()


def write(tables: list[Table], format: str) -> str:
    """Return all tables as "markdown", "latex" or "csv"."""
    if format == "csv":
        return to_csv([table for table in tables if not table.name])
    one = {"markdown": to_markdown, "latex": to_latex}[format]
    return "\n".join(map(one, tables))


def latex_text(text: str) -> str:
    """Escape a text for LaTeX, and write the signs that our tables use as commands."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in " ".join(text.split()))


def _delta(line: Line, column: str, table: Table) -> str:
    cell = line.cells[column]
    return f"{signed(cell.delta, table.decimals)} {interval(cell, table.decimals)}".rstrip()


def _all_notes(table: Table) -> list[str]:
    published = {line.source for line in table.published}
    sources = [f"Published rows: {source}." for source in sorted(published)]
    code = code_note(table)
    return [*table.notes, *sources, *([code] if code else [])]


def _marks(marks: tuple[int, ...]) -> str:
    return " " + " ".join(str(m).translate(SUPERSCRIPTS) for m in sorted(marks)) if marks else ""


def _latex_marks(marks: tuple[int, ...]) -> str:
    return rf"$^{{{','.join(map(str, sorted(marks)))}}}$" if marks else ""


def _latex_heading(metric: str, columns: tuple[str, ...]) -> str:
    """Return AP$_{50}^{\\text{bbox}}$-like headings without needing amsmath."""
    name, _, family = heading(metric, columns).partition("^")
    match = re.fullmatch(r"AP(\w*)", name)
    if not match:
        return latex_text(name)
    lower = rf"_{{\mathrm{{{match[1]}}}}}" if match[1] else ""
    upper = rf"^{{\mathrm{{{family}}}}}" if family else ""
    return f"AP${lower}{upper}$" if lower or upper else "AP"


def _markdown_text(text: str) -> str:
    text = " ".join(text.split())
    return re.sub(r"([|<>`])", r"\\\1", text)


def _csv(value: float | None) -> str:
    return "" if value is None else repr(value)
