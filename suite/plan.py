"""A suite as a plan: initialisations × protocols × seeds become jobs with what each depends on.

    pretrain ──▶ convert ──▶ detection        one chain per initialisation and seed; the pretrained
    weights ───▶ convert ──▶ detection        and converted weights serve every protocol

Nothing here runs or writes anything.
"""

import dataclasses
import difflib
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.config import ROOT, InputError, find_config, load_config, read_with_bases
from report.reference import load_reference
from report.tables import Options

CONVERT_MINUTES = 0.2
METHODS = ("random", "ce", "ctc")
TOOLS = {"pretrain": "run_pretrain.py", "convert": "convert_to_d2.py", "detection": "train_net.py"}


@dataclasses.dataclass  # not frozen, for OmegaConf cannot fill a dict with what it may not change
class Initialisation:
    """Where the weights come from: a pretraining of this suite, or a checkpoint that exists."""

    config: str = ""  # pretraining config
    method: str = ""  # with it: one of METHODS
    overrides: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # dotted keys of that config
    weights: str = ""  # instead: a checkpoint of any format the converter knows
    format: str = ""  # its format, where the converter asks for it
    arguments: list[str] = dataclasses.field(default_factory=list)  # more for run_pretrain.py
    minutes: float = 0.0  # expected, for the first ETA; 0: unknown
    label: str = ""  # in the tables; empty: the name


@dataclasses.dataclass  # not frozen, as above
class Protocol:
    """What is done with the weights."""

    config: str = ""  # detection config
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # its KEY VALUE
    arguments: list[str] = dataclasses.field(default_factory=list)  # more for train_net.py
    minutes: float = 0.0  # expected, for the first ETA; 0: unknown


@dataclasses.dataclass(frozen=True)
class Suite:
    """One table: which initialisations, under which protocols, with which seeds."""

    title: str = ""
    description: str = ""
    initialisations: dict[str, Initialisation] = dataclasses.field(default_factory=dict)
    protocols: dict[str, Protocol] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    gpus: int = 0  # per job; 0: one process on what the tools choose
    baseline: str = "ce"  # every Δ refers to it
    columns: list[str] = dataclasses.field(default_factory=list)  # empty: Table 5's
    references: list[str] = dataclasses.field(default_factory=list)  # published tables; empty: any
    images: int = 6  # validation images in the page
    score: float = 0.5  # predictions below it are not drawn


@dataclasses.dataclass(frozen=True)
class Job:
    """One command: what it makes, what it needs, and the recipe that its product depends on."""

    name: str  # "pretrain/ctc-s1", "convert/ctc-s1", "<protocol>/ctc-s1"
    kind: str  # a key of TOOLS
    init: str
    seed: int
    protocol: str  # "" for pretrain and convert, which serve all protocols
    output: Path  # run folder; for convert the file
    recipe: dict[str, Any]  # dotted keys → values: config chain, overrides, seed
    words: tuple[str, ...] = ()  # what stands first on the tool's command line
    options: tuple[str, ...] = ()  # its options, but for input, output and --resume
    pairs: tuple[str, ...] = ()  # KEY VALUE overrides, at its end
    minutes: float = 0.0  # expected; 0: unknown
    needs: str = ""  # the job whose product is its input
    weights: Path | None = None  # or a file that exists is its input


@dataclasses.dataclass(frozen=True)
class Plan:
    """All jobs of a suite in an order in which every job comes after what it needs."""

    suite: Suite
    name: str
    root: Path  # runs/<name>
    jobs: tuple[Job, ...]

    def job(self, name: str) -> Job:
        """Return the job of that name."""
        return next(job for job in self.jobs if job.name == name)

    @property
    def cells(self) -> tuple[Job, ...]:
        """Return the evaluations: what ends up in the table."""
        return tuple(job for job in self.jobs if job.protocol)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and check a suite.

    Raises:
        InputError: unknown key, wrong type, nothing to run, a baseline, name or seed that makes no
            sense.
    """
    _check_keys(path, overrides)
    suite = load_config(Suite, path, overrides, folder="suites")
    where = str(path)
    if not suite.initialisations or not suite.protocols or not suite.seeds:
        raise InputError(f"{where} needs at least one initialisation, one protocol and one seed")
    if len(set(suite.seeds)) < len(suite.seeds) or min(suite.seeds) < 0:
        raise InputError(f"{where}: seeds {suite.seeds} must be different and not negative")
    if suite.baseline not in suite.initialisations:
        hint = _nearest(suite.baseline, suite.initialisations)
        raise InputError(f"{where}: baseline {suite.baseline!r} is no initialisation of it{hint}")
    for name in suite.references:
        if name not in load_reference().tables:
            hint = _nearest(name, load_reference().tables)
            raise InputError(f"{where}: references {name!r} is no published table{hint}")
    for kind, names in (("initialisation", suite.initialisations), ("protocol", suite.protocols)):
        for name in names:
            if (
                not name
                or name in (*TOOLS, "weights", "jobs", "logs", "figures")
                or any(c in name for c in "/\\:*?\n")
                or name[0] in ".-"
            ):
                raise InputError(f"{where}: {kind} {name!r} cannot name a folder: rename it")
    for name, init in suite.initialisations.items():
        if bool(init.config) == bool(init.weights):
            raise InputError(f"{where}: initialisation {name!r} needs either config or weights")
        if init.config and init.method not in METHODS:
            known = ", ".join(METHODS)
            raise InputError(f"{where}: initialisation {name!r} needs a method, one of {known}")
    for name, protocol in suite.protocols.items():
        if not protocol.config:
            raise InputError(f"{where}: protocol {name!r} needs a config")
    return suite


def make_plan(suite: Suite, name: str, root: str | Path) -> Plan:
    """Return the jobs of a suite that is to live in ``root``.

    Raises:
        InputError: a config is not there.
    """
    root = Path(root).absolute()
    jobs: list[Job] = []
    for seed in suite.seeds:
        for init_name, init in suite.initialisations.items():
            sources = _weights_jobs(init_name, init, seed, suite, root)
            jobs += [job for job in sources if job.name not in {known.name for known in jobs}]
            for protocol_name, protocol in suite.protocols.items():
                jobs.append(
                    _detection_job(
                        init_name, seed, protocol_name, protocol, sources[-1], suite, root
                    )
                )
    return Plan(suite, name, root, tuple(jobs))


def select(plan: Plan, only: Sequence[str]) -> Plan:
    """Keep the cells that a word of ``only`` names, and what they need.

    A word is an initialisation, a protocol, or a pattern for ``<protocol>/<init>-s<seed>``.

    Raises:
        InputError: a word names no cell.
    """
    if not only:
        return plan
    kept: set[str] = set()
    for word in only:
        names = [
            cell.name
            for cell in plan.cells
            if word in (cell.init, cell.protocol) or fnmatch.fnmatchcase(cell.name, word)
        ]
        if not names:
            known = ", ".join([*plan.suite.initialisations, *plan.suite.protocols])
            raise InputError(
                f"--only {word} names no cell; there are {known} (or PROTOCOL/INIT-sN)"
            )
        kept.update(names)
    for job in reversed(plan.jobs):  # what is needed comes before what needs it
        if job.name in kept and job.needs:
            kept.add(job.needs)
    return dataclasses.replace(plan, jobs=tuple(job for job in plan.jobs if job.name in kept))


def check_weights(plan: Plan) -> None:
    """Raise InputError if a checkpoint that the plan is given is not there."""
    for job in plan.jobs:
        if job.weights is not None and not job.weights.is_file():
            raise InputError(
                f"initialisation {job.init!r}: there is no weights file {job.weights}; put it "
                f"there, name it with initialisations.{job.init}.weights PATH, or choose other "
                "cells with --only"
            )


def table_options(suite: Suite) -> Options:
    """Return how the suite's tables are to look."""
    return Options(
        baseline=suite.baseline,
        order=tuple(suite.initialisations),
        labels={name: init.label for name, init in suite.initialisations.items() if init.label},
        columns=tuple(suite.columns),
        references=tuple(suite.references),
        expected={name: len(suite.seeds) for name in suite.initialisations},
    )


def command(
    job: Job, source: str, resume: bool, gpus: int, tools: Path = ROOT / "tools"
) -> list[str]:
    """Return the command line of a job, given its input file."""
    python = [sys.executable]
    launch = gpus > 1 and job.kind == "pretrain"
    if launch:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    words = [*job.words, *([source] if job.kind == "convert" else [])]
    given = ["--weights", source] if job.kind == "detection" else []
    if job.kind == "detection" and gpus:
        given += ["--num-gpus", str(gpus)]
    output = ["--output", str(job.output), *(["--resume"] if resume else [])]
    tool = str(tools / TOOLS[job.kind])
    return [*python, tool, *words, *job.options, *given, *output, *job.pairs]


def _check_keys(path: str | Path, overrides: Sequence[str]) -> None:
    """Raise InputError, naming the nearest, on an unknown key of an initialisation or protocol."""
    entries = [(str(path), key) for key in overrides[::2]]
    for file, content in read_with_bases(find_config(path, "suites")):
        for group in ("initialisations", "protocols"):
            named = content.get(group)
            for name, value in named.items() if isinstance(named, dict) else ():
                keys = value if isinstance(value, dict) else ()
                entries += [(str(file), f"{group}.{name}.{key}") for key in keys]
    schemas = {"initialisations": Initialisation, "protocols": Protocol}
    for where, entry in entries:
        group, *rest = entry.split(".")
        known = {f.name for f in dataclasses.fields(schemas[group])} if group in schemas else set()
        if known and len(rest) > 1 and rest[1] not in known:
            raise InputError(f"{where}: unknown key {entry!r}{_nearest(rest[1], known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _weights_jobs(
    name: str, init: Initialisation, seed: int, suite: Suite, root: Path
) -> list[Job]:
    """Return the jobs that end in converted weights: one per seed, or one for given weights."""
    if init.weights:
        file = _weights_file(init.weights)
        output = root / "weights" / f"{name}_d2.pth"
        convert = Job(
            f"convert/{name}", "convert", name, seed, "", output, {"format": init.format},
            options=("--format", init.format) if init.format else (),
            minutes=CONVERT_MINUTES, weights=file,
        )  # fmt: skip
        return [convert]
    config = find_config(init.config, "pretrain")
    recipe = _recipe(config, init.overrides)
    recipe |= {"seed": seed, "method": init.method, "arguments": init.arguments}
    options = ("--config", str(config), "--init", name, *init.arguments)
    pairs = _pairs({**_flat(init.overrides), "seed": seed})
    stem = f"{name}-s{seed}"
    pretrain = Job(
        f"pretrain/{stem}", "pretrain", name, seed, "", root / "pretrain" / stem,
        recipe, (init.method,), options, tuple(pairs), init.minutes,
    )  # fmt: skip
    output = root / "weights" / f"{stem}_d2.pth"
    convert = Job(
        f"convert/{stem}", "convert", name, seed, "", output, {},
        minutes=CONVERT_MINUTES, needs=pretrain.name,
    )  # fmt: skip
    return [pretrain, convert]


def _detection_job(
    init: str, seed: int, name: str, protocol: Protocol, source: Job, suite: Suite, root: Path
) -> Job:
    config = find_config(protocol.config, "detection")
    recipe = _recipe(config, protocol.overrides)
    recipe |= {"seed": seed, "gpus": suite.gpus, "arguments": protocol.arguments}
    options = ("--config", str(config), "--init", init, "--seed", str(seed), *protocol.arguments)
    stem = f"{init}-s{seed}"
    return Job(
        f"{name}/{stem}", "detection", init, seed, name, root / name / stem, recipe,
        options=options, pairs=tuple(_pairs(_flat(protocol.overrides), plain=True)),
        minutes=protocol.minutes, needs=source.name,
    )  # fmt: skip


def _weights_file(weights: str) -> Path:
    """Return the checkpoint as given, or else under the checkout's root."""
    given, under_root = Path(weights).expanduser().absolute(), ROOT / weights
    return under_root if under_root.is_file() and not given.is_file() else given


def _recipe(config: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config chain under dotted keys; defaults in the code are not in it."""
    values: dict[str, Any] = {}
    for _, content in read_with_bases(config):
        values.update(_flat(content))
    return {**values, **_flat(overrides)}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pairs(values: dict[str, Any], plain: bool = False) -> Iterable[str]:
    """Return KEY VALUE words: YAML for our own tools, Python (``plain``) for detectron2's keys."""
    for key, value in values.items():
        yield key
        if not plain and (value is None or isinstance(value, bool)):
            yield {None: "null", True: "true", False: "false"}[value]
        else:
            yield str(value)
