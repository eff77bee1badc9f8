"""A suite as jobs: initialisations × protocols × seeds, what each job needs, and its command line.

    pretrain ─┬─▶ convert ──▶ detection     one chain per initialisation and seed; the pretrained
    weights ──┴─▶ transfer                  and converted weights serve every protocol

Nothing here runs or writes anything.
"""

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.config import ROOT, InputError, find_config, read_with_bases, recipe_and_data
from core.launch import ALONE, Place
from suite.schema import Initialisation, Protocol, Suite, step_of

CONVERT_MINUTES, CONVERT_GIGABYTES = 0.2, 0.1  # of a ResNet-50
EXPECTED_ON_GPUS = 8  # SUITE.EXPECTED_HOURS of a detection config is the time on so many GPUs
LIBRARIES = ("timm:", "torchvision:")  # weights that the tools find by a library's name for them
SUITE_FILE = "suite.yaml"  # the resolved suite, in its folder
RANKS = {  # how the tools that have --resume get several processes; others run as one
    "run_pretrain.py": "launcher",
    "run_transfer.py": "launcher",
    "train_net.py": "own options",
}
KINDS = {
    "pretrain": "run_pretrain.py",
    "convert": "convert_to_d2.py",
    "detection": "train_net.py",
    "transfer": "run_transfer.py",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One command: what it makes, what it needs, and the recipe that its product depends on."""

    name: str  # "pretrain/ctc-s1", "convert/ctc-s1", "<protocol>/ctc-s1"
    kind: str  # a key of KINDS
    init: str
    seed: int
    protocol: str  # "" for pretrain and convert, which serve all protocols
    output: Path  # run folder; for convert the file
    recipe: dict[str, Any]  # dotted keys → values: config chain, overrides, seed
    words: tuple[str, ...] = ()  # of the command line: before and among its options, without
    pairs: tuple[str, ...] = ()  # input, output and --resume; then KEY VALUE overrides
    minutes: float = 0.0  # expected; 0: unknown
    gigabytes: float = 0.0  # written at most; 0: unknown
    needs: str = ""  # the job whose product is the input
    weights: Path | str | None = None  # or the input is a file that exists, or a library's name
    gpus: int = 0  # 0: one process on what the tool chooses

    @property
    def alike(self) -> str:
        """What jobs of about equal length and size share: the initialisation or the protocol."""
        return f"{self.kind} {self.init if self.kind == 'pretrain' else self.protocol}"

    def __str__(self) -> str:
        seed = "" if self.weights is not None else f", seed {self.seed}"
        return f"{self.protocol or self.kind} {self.init}{seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All jobs of a suite; every job comes after the one that it needs."""

    suite: Suite
    name: str
    root: Path  # runs/<name>
    jobs: tuple[Job, ...]

    def job(self, name: str) -> Job:
        """Return the job of that name."""
        return next(job for job in self.jobs if job.name == name)

    @property
    def cells(self) -> tuple[Job, ...]:
        """Return the evaluations, which the table shows."""
        return tuple(job for job in self.jobs if job.protocol)


def make_plan(suite: Suite, name: str, root: str | Path) -> Plan:
    """Return the jobs of a suite whose folder is ``root``.

    Raises:
        InputError: a config does not exist.
    """
    root = Path(root).absolute()
    jobs: dict[str, Job] = {}
    for seed in suite.seeds:
        for init_name, init in suite.initialisations.items():
            chain: list[Job] = []
            pretrain = _pretrain_job(suite, init_name, seed, root) if init.config else None
            convert = _convert_job(init_name, init, seed, pretrain, root)
            chain += [pretrain] if pretrain else []
            for protocol_name, protocol in suite.protocols.items():
                detects = step_of(protocol) == "detection"
                chain += [convert] if detects and convert not in chain else []
                source = convert if detects else pretrain
                chain.append(_cell(suite, init_name, seed, protocol_name, source, root))
            jobs |= {job.name: job for job in chain if job.name not in jobs}
    return Plan(suite, name, root, tuple(jobs.values()))


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
                f"--only {word} names no cell; known are {known} (or PROTOCOL/INIT-sN)"
            )
        kept.update(names)
    for job in reversed(plan.jobs):  # what is needed comes before what needs it
        if job.name in kept and job.needs:
            kept.add(job.needs)
    return dataclasses.replace(plan, jobs=tuple(job for job in plan.jobs if job.name in kept))


def check_weights(plan: Plan) -> None:
    """Raise InputError if a checkpoint that the suite names does not exist."""
    for job in plan.jobs:
        if isinstance(job.weights, Path) and not job.weights.is_file():
            raise InputError(
                f"initialisation {job.init!r}: weights file {job.weights} does not exist; set "
                f"initialisations.{job.init}.weights PATH, or choose other cells with --only"
            )


def command(
    job: Job,
    source: Path | str | None,
    resume: bool = False,
    rehearse: bool = False,
    tools: Path = ROOT / "tools",
) -> list[str]:
    """Return the command line of a job.

    Args:
        source: its input: a file, a library's name, or None for a pretraining.
        resume: continue the run in its output folder.
        rehearse: check only (``--dry-run``), for an output folder that does not exist.
    """
    output = job.output.with_name(f"{job.output.name}.dry-run") if rehearse else job.output
    given = {"pretrain": [], "convert": [str(source)]}.get(job.kind, ["--weights", str(source)])
    words = [*job.words, *given] if job.kind != "convert" else [*given, *job.words]
    flags = [flag for flag, on in (("--resume", resume), ("--dry-run", rehearse)) if on]
    tool = [str(tools / KINDS[job.kind]), *words, "--output", str(output), *flags, *job.pairs]
    processes = job.gpus if not rehearse or job.kind == "detection" else 0
    return launch(tool, processes)


def launch(words: Sequence[str], gpus: int, place: Place = ALONE) -> list[str]:
    """Return the command that runs a tool on ``gpus`` GPUs of each machine.

    Args:
        words: the tool's file and its arguments.
        gpus: per machine; 0: what the tool chooses, in one process.

    Raises:
        InputError: a tool that runs as one process is to run on several GPUs or machines.
    """
    tool, *arguments = words
    ranks, processes = RANKS.get(Path(tool).name, ""), max(gpus, 1)
    if processes * place.nodes == 1 and ranks != "own options":
        return [sys.executable, *words]
    if ranks == "launcher":
        launcher = [sys.executable, str(ROOT / "tools/launch.py"), f"--processes={processes}"]
        launcher += ["--nodes", str(place.nodes)]
        if place.nodes > 1:
            launcher += ["--node", str(place.node), "--host", place.host, "--port", str(place.port)]
        return [*launcher, *words]
    if ranks == "own options":
        options = ["--num-gpus", str(gpus)] if gpus else []
        if place.nodes > 1:
            options += ["--num-machines", str(place.nodes), "--machine-rank", str(place.node)]
            options += ["--dist-url", f"tcp://{place.host}:{place.port}"]
        return [sys.executable, tool, *options, *arguments]
    raise InputError(
        f"{Path(tool).name} runs as one process: not on {place.nodes} × {processes} GPUs, but with "
        "--nodes 1 --gpus 1"
    )


def _pretrain_job(suite: Suite, name: str, seed: int, root: Path) -> Job:
    init = suite.initialisations[name]
    config = find_config(init.config, "pretrain")
    recipe = _recipe(config, init.overrides)
    recipe |= {"seed": seed, "method": init.method, "arguments": init.arguments}
    stem = f"{name}-s{seed}"
    return Job(
        f"pretrain/{stem}", "pretrain", name, seed, "", root / "pretrain" / stem, recipe,
        words=(init.method, "--config", str(config), "--init", name, *init.arguments),
        pairs=tuple(_pairs({**_flat(init.overrides), "seed": seed})), minutes=init.minutes,
        gigabytes=init.gigabytes, gpus=suite.gpus,
    )  # fmt: skip


def _convert_job(name: str, init: Initialisation, seed: int, source: Job | None, root: Path) -> Job:
    """Return the conversion of a pretraining, or of given weights, once for all seeds."""
    stem = f"{name}-s{seed}" if source else name
    return Job(
        f"convert/{stem}", "convert", name, seed, "", root / "weights" / f"{stem}_d2.pth",
        {"format": init.format} | _named(init), words=_format(init), minutes=CONVERT_MINUTES,
        gigabytes=CONVERT_GIGABYTES, needs=source.name if source else "", weights=_given(init),
    )  # fmt: skip


def _cell(
    suite: Suite, init_name: str, seed: int, name: str, source: Job | None, root: Path
) -> Job:
    """Return an evaluation; a transfer reads the weights unconverted."""
    init, protocol = suite.initialisations[init_name], suite.protocols[name]
    kind, stem = step_of(protocol), f"{init_name}-s{seed}"
    config, data = recipe_and_data(protocol.config, kind)
    recipe = _recipe(config, protocol.overrides)
    words = ["--config", str(config), "--init", init_name]
    if data:
        recipe |= {"data.name": data}
        words += ["--data", data]
    if kind == "detection":
        recipe |= {"gpus": suite.gpus}
        words += ["--seed", str(seed)]
        pairs = _pairs(_flat(protocol.overrides), plain=True)
    else:
        recipe |= _named(init)
        words += _format(init)
        pairs = _pairs({**_flat(protocol.overrides), "seed": seed})
    recipe |= {"seed": seed, "arguments": protocol.arguments}
    return Job(
        f"{name}/{stem}", kind, init_name, seed, name, root / name / stem, recipe,
        words=(*words, *protocol.arguments), pairs=tuple(pairs),
        minutes=protocol.minutes or _published_minutes(recipe, protocol, suite.gpus),
        gigabytes=protocol.gigabytes, needs=source.name if source else "",
        weights=None if kind == "detection" else _given(init), gpus=suite.gpus,
    )  # fmt: skip


def _published_minutes(recipe: dict[str, Any], protocol: Protocol, gpus: int) -> float:
    """Return what ``SUITE.EXPECTED_HOURS`` says of a detector on so many GPUs; 0 where nothing."""
    if not gpus or protocol.overrides or protocol.arguments:
        return 0.0
    return 60 * recipe.get("SUITE.EXPECTED_HOURS", 0.0) * EXPECTED_ON_GPUS / gpus


def _format(init: Initialisation) -> tuple[str, ...]:
    return ("--format", init.format) if init.format else ()


def _named(init: Initialisation) -> dict[str, str]:
    """Return a library's name for the weights as a part of the recipe: there is no file to hash."""
    return {"weights": init.weights} if init.weights.startswith(LIBRARIES) else {}


def _given(init: Initialisation) -> Path | str | None:
    """Return the checkpoint as given, or else under the checkout's root; None if it is pretrained.

    ``timm:NAME`` and ``torchvision:NAME`` are resolved by the tools.
    """
    if not init.weights or init.weights.startswith(LIBRARIES):
        return init.weights or None
    given, under_root = Path(init.weights).expanduser().absolute(), ROOT / init.weights
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
