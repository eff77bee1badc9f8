"""A suite as a plan: initialisations × protocols × seeds become jobs with what each depends on.

    pretrain ─┬─▶ convert ──▶ detection     one chain per initialisation and seed; the pretrained
    weights ──┴─▶ transfer                  and converted weights serve every protocol

Nothing here runs or writes anything.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.config import ROOT, InputError, find_config, read_with_bases
from suite.launch import launch
from suite.schema import Initialisation, Protocol, Suite, step_of

CONVERT_MINUTES, CONVERT_GIGABYTES = 0.2, 0.1  # of a ResNet-50
EXPECTED_ON_GPUS = 8  # that SUITE.EXPECTED_HOURS of a detection config is for
LIBRARIES = ("timm:", "torchvision:")  # weights that the tools find by a library's name for them
TOOLS = {
    "pretrain": "run_pretrain.py",
    "convert": "convert_to_d2.py",
    "detection": "train_net.py",
    "transfer": "run_transfer.py",
}


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
    gigabytes: float = 0.0  # that it will write, at most; 0: unknown
    needs: str = ""  # the job whose product is its input
    weights: Path | str | None = None  # or its input is a file that exists, or a library's name


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


def make_plan(suite: Suite, name: str, root: str | Path) -> Plan:
    """Return the jobs of a suite that is to live in ``root``.

    Raises:
        InputError: a config is not there.
    """
    root = Path(root).absolute()
    jobs: list[Job] = []
    for seed in suite.seeds:
        for init_name, init in suite.initialisations.items():
            pretrain = _pretrain_job(init_name, init, seed, root) if init.config else None
            convert = _convert_job(init_name, init, seed, pretrain, root)
            found = [pretrain] if pretrain else []
            for protocol_name, protocol in suite.protocols.items():
                if step_of(protocol) == "transfer":
                    found.append(
                        _transfer_job(
                            init_name, init, seed, protocol_name, protocol, pretrain, root
                        )
                    )
                    continue
                found += [convert] if convert not in found else []
                found.append(
                    _detection_job(
                        init_name, seed, protocol_name, protocol, convert, suite.gpus, root
                    )
                )
            jobs += [job for job in found if job.name not in {known.name for known in jobs}]
    return Plan(suite, name, root, tuple(jobs))


def kind_of(job: Job) -> str:
    """Return what jobs of about equal length and size share: initialisation, or protocol."""
    return f"{job.kind} {job.init if job.kind == 'pretrain' else job.protocol}"


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
        if isinstance(job.weights, Path) and not job.weights.is_file():
            raise InputError(
                f"initialisation {job.init!r}: there is no weights file {job.weights}; put it "
                f"there, name it with initialisations.{job.init}.weights PATH, or choose other "
                "cells with --only"
            )


def command(
    job: Job, source: str, resume: bool, gpus: int, tools: Path = ROOT / "tools"
) -> list[str]:
    """Return the command line of a job, given its input file."""
    words = [*job.words, *([source] if job.kind == "convert" else [])]
    given = ["--weights", source] if job.kind in ("detection", "transfer") else []
    output = ["--output", str(job.output), *(["--resume"] if resume else [])]
    tool = str(tools / TOOLS[job.kind])
    return launch(
        [tool, *words, *job.options, *given, *output, *job.pairs],
        gpus if job.kind != "convert" else 0,
    )


def _pretrain_job(name: str, init: Initialisation, seed: int, root: Path) -> Job:
    config = find_config(init.config, "pretrain")
    recipe = _recipe(config, init.overrides)
    recipe |= {"seed": seed, "method": init.method, "arguments": init.arguments}
    stem = f"{name}-s{seed}"
    return Job(
        f"pretrain/{stem}", "pretrain", name, seed, "", root / "pretrain" / stem, recipe,
        words=(init.method,), options=("--config", str(config), "--init", name, *init.arguments),
        pairs=tuple(_pairs({**_flat(init.overrides), "seed": seed})), minutes=init.minutes,
        gigabytes=init.gigabytes,
    )  # fmt: skip


def _convert_job(name: str, init: Initialisation, seed: int, source: Job | None, root: Path) -> Job:
    """Return the conversion of a pretraining, or of given weights, once for all seeds."""
    stem = f"{name}-s{seed}" if source else name
    return Job(
        f"convert/{stem}", "convert", name, seed, "", root / "weights" / f"{stem}_d2.pth",
        {"format": init.format} | _named(init), options=_format(init), minutes=CONVERT_MINUTES,
        gigabytes=CONVERT_GIGABYTES,
        needs=source.name if source else "", weights=_given_weights(init),
    )  # fmt: skip


def _detection_job(
    init: str, seed: int, name: str, protocol: Protocol, source: Job, gpus: int, root: Path
) -> Job:
    config = find_config(protocol.config, "detection")
    recipe = _recipe(config, protocol.overrides)
    recipe |= {"seed": seed, "gpus": gpus, "arguments": protocol.arguments}
    options = ("--config", str(config), "--init", init, "--seed", str(seed), *protocol.arguments)
    stem = f"{init}-s{seed}"
    return Job(
        f"{name}/{stem}", "detection", init, seed, name, root / name / stem, recipe,
        options=options, pairs=tuple(_pairs(_flat(protocol.overrides), plain=True)),
        minutes=protocol.minutes or _published_minutes(recipe, protocol, gpus), needs=source.name,
        gigabytes=protocol.gigabytes,
    )  # fmt: skip


def _published_minutes(recipe: dict[str, Any], protocol: Protocol, gpus: int) -> float:
    """Return what ``SUITE.EXPECTED_HOURS`` says of a detector on so many GPUs; 0 where nothing."""
    if not gpus or protocol.overrides or protocol.arguments:
        return 0.0
    return 60 * recipe.get("SUITE.EXPECTED_HOURS", 0.0) * EXPECTED_ON_GPUS / gpus


def _transfer_job(
    init_name: str, init: Initialisation, seed: int, name: str, protocol: Protocol,
    source: Job | None, root: Path,
) -> Job:  # fmt: skip
    """Return a transfer to classification, which reads the weights unconverted."""
    config = find_config(protocol.config, "transfer")
    recipe = _recipe(config, protocol.overrides) | _named(init)
    recipe |= {"seed": seed, "arguments": protocol.arguments}
    options = ("--config", str(config), "--init", init_name, *_format(init), *protocol.arguments)
    stem = f"{init_name}-s{seed}"
    return Job(
        f"{name}/{stem}", "transfer", init_name, seed, name, root / name / stem, recipe,
        options=options, pairs=tuple(_pairs({**_flat(protocol.overrides), "seed": seed})),
        minutes=protocol.minutes, gigabytes=protocol.gigabytes,
        needs=source.name if source else "", weights=_given_weights(init),
    )  # fmt: skip


def _format(init: Initialisation) -> tuple[str, ...]:
    return ("--format", init.format) if init.format else ()


def _named(init: Initialisation) -> dict[str, str]:
    """Return a library's name for the weights as a part of the recipe: there is no file to hash."""
    return {"weights": init.weights} if init.weights.startswith(LIBRARIES) else {}


def _given_weights(init: Initialisation) -> Path | str | None:
    """Return the checkpoint as given, or else under the checkout's root; None where it is made.

    ``timm:NAME`` and ``torchvision:NAME`` are names for the tools, which say what is not there.
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
