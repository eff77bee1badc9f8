#!/usr/bin/env python3
"""Follow a pretraining over its saved epochs: discriminability, transferability, information.

tools/run_analysis.py --run runs/NAME --config analysis/timeline_cifar100.yaml
tools/run_analysis.py --run runs/ce --run runs/ctc --config … --figures docs/timeline    # together
tools/run_analysis.py --rows docs/timeline/results.jsonl --figures docs/timeline    # figures alone

Every number becomes a row of RUN/results.jsonl (step "analysis"), and each run has its figures in
RUN/figures; with --figures all runs are drawn over each other instead. What is done is skipped, so
the same command goes on after an interruption, and may run beside a training that still writes.
Exit status: 0 all epochs measured, 1 some were missing or unreadable (they are named), 2 bad input,
75 stopped by a signal.
"""

import _checkout  # isort:skip

import argparse
import sys
from pathlib import Path

from core.results import ROWS_FILE, ResultRow, read_rows


def parse() -> argparse.Namespace:
    parser = _checkout.Parser(__doc__)
    parser.add_argument("--run", type=Path, action="append", default=[], help="a run folder")
    parser.add_argument("--config", help="a file, or a name under configs/")
    parser.add_argument("--init", default="", help="how rows name the run; default: its method")
    parser.add_argument("--rows", type=Path, action="append", default=[], help="rows to draw too")
    parser.add_argument("--figures", type=_checkout.folder, help="draw all runs together, here")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    from core.errors import InputError

    if arguments.run and not arguments.config and not arguments.figures:
        raise InputError(
            "--run needs --config, for example --config analysis/timeline_cifar100.yaml"
        )
    if not arguments.run and not arguments.rows:
        raise InputError(
            "give --run RUN_FOLDER (and --config), or --rows FILE with --figures FOLDER"
        )
    incomplete = False
    if arguments.config:
        for run in arguments.run:
            incomplete |= walk(run, arguments)
    if arguments.figures and not arguments.dry_run:
        files = [*arguments.rows, *(run / ROWS_FILE for run in arguments.run)]
        draw([row for file in files for row in read_rows(file)], arguments.figures)
    return 1 if incomplete else 0


def walk(run: Path, arguments: argparse.Namespace) -> bool:
    """Measure one run; return whether epochs were missing or unreadable."""
    from analysis.timeline import Timeline, TimelineConfig, summary
    from core.config import InputError, find_config, load_config, shipped_config
    from core.files import locked
    from core.progress import Progress

    name = find_config(arguments.config, "analysis")
    try:
        config = load_config(TimelineConfig, name, arguments.overrides, "analysis")
    except InputError:
        raise
    except ValueError as error:  # a value that analysis.mutual_information.Settings refuses
        raise InputError(f"{name}: information: {error}") from None
    named = load_config(TimelineConfig, shipped_config(name.stem, "analysis") or name)
    timeline = Timeline(run, config, name.stem, arguments.init, named)
    todo = timeline.todo()
    print("\n".join(summary(timeline, todo)), flush=True)
    if todo and not arguments.dry_run:
        lock = locked(run, "another analysis", ".analysis.lock")  # a training may hold its own
        with lock, Progress(len(todo), f"analysis {run.name}") as bar:
            for rows in timeline.work():
                for row in rows:
                    bar.say(line(row))
                bar.update(len({row.epoch for row in rows}), epoch=str(rows[-1].epoch))
        print(f"rows: {run / ROWS_FILE}")
    if not arguments.figures and not arguments.dry_run and (run / ROWS_FILE).is_file():
        rows = [row for row in read_rows(run / ROWS_FILE) if row.step == "analysis"]
        if rows:
            draw(rows, run / "figures")
    absent = timeline.survey.missing or timeline.survey.unreadable
    for sentence in timeline.survey.sentences() if absent else ():
        print(sentence, file=sys.stderr)
    return bool(absent)


def line(row: ResultRow) -> str:
    """Return a row as one line, with its spread over seeds and, for InfoNCE, its cap."""
    value = f"{row.value:.4g}" if row.value is not None else "–"
    std = f" ± {row.details['std']:.2g}" if row.details.get("std") else ""
    cap = f" (cap log N = {row.details['cap']:.4g})" if "cap" in row.details else ""
    unit = "" if row.unit == "1" else f" {row.unit}"
    return f"epoch {row.epoch}  {row.dataset}/{row.split}  {row.metric} {value}{std}{unit}{cap}"


def draw(rows: list[ResultRow], folder: Path) -> None:
    """Draw the figures of some rows, as PNG and SVG, and print what they leave out."""
    from report.timeline import gather
    from report.timeline_figures import save_timeline_figures

    for protocol, data in gather(rows).items():
        for note in data.notes:
            print(f"{protocol}: {note}")
    for path in save_timeline_figures(rows, folder):
        print(path)


if __name__ == "__main__":
    _checkout.run(main)
