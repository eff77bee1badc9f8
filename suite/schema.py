"""The YAML of a suite: its schema, and how it is read and checked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import InputError, load_config, nearest
from report.reference import load_reference
from report.tables import Options

METHODS = ("random", "ce", "ctc")
STEPS = ("detection", "transfer")
RESERVED = (  # folders beside those of protocols
    "pretrain", "convert", "detection", "transfer", "weights", "jobs", "logs", "figures", "slurm",
)  # fmt: skip


@dataclasses.dataclass  # not frozen: OmegaConf fills it inside a dict
class Initialisation:
    """Where the weights come from: a pretraining of this suite, or a checkpoint that exists."""

    config: str = ""  # pretraining config
    method: str = ""  # with it: one of METHODS
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # keys of that config
    weights: str = ""  # instead: a checkpoint of any format the converter knows
    format: str = ""  # its format, if the converter asks for it
    arguments: list[str] = dataclasses.field(default_factory=list)  # more for run_pretrain.py
    minutes: float = 0.0  # expected, for the first ETA; 0: unknown
    gigabytes: float = 0.0  # that its run writes, for --dry-run; 0: unknown
    label: str = ""  # in the tables; "": the name


@dataclasses.dataclass  # not frozen, as above
class Protocol:
    """How weights are evaluated."""

    config: str = ""  # detection or transfer config
    step: str = ""  # "detection" or "transfer"; "": by the config's folder
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # keys of its config
    arguments: list[str] = dataclasses.field(default_factory=list)  # more for the tool
    minutes: float = 0.0  # expected, for the first ETA; 0: what the config says, or unknown
    gigabytes: float = 0.0  # that one run writes, for --dry-run; 0: unknown


@dataclasses.dataclass(frozen=True)
class Transfers:
    """Protocols of transfer, each on each data set; a pair becomes ``<data>_<protocol>``."""

    data: list[str] = dataclasses.field(default_factory=list)
    protocols: list[str] = dataclasses.field(default_factory=list)  # recipes in configs/transfer
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of all pairs
    minutes: dict[str, float] = dataclasses.field(default_factory=dict)  # protocol → expected
    gigabytes: dict[str, float] = dataclasses.field(default_factory=dict)  # protocol → written


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Options of a SLURM job; the suite or the command line sets its GPUs."""

    partition: str = ""  # "": the cluster's default
    account: str = ""
    hours: float = 24.0  # then the job saves, is queued again and resumes
    cpus_per_gpu: int = 8  # also what a job without a GPU gets
    memory_gb: float = 0.0  # per machine; 0: the partition's default
    save_seconds: int = 120  # from the signal to save until SLURM ends the job
    requeues: int = 20  # time-outs after which the job is not queued again
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of sbatch's options


@dataclasses.dataclass(frozen=True)
class Suite:
    """Initialisations × protocols × seeds, and how they are shown."""

    title: str = ""
    description: str = ""
    initialisations: dict[str, Initialisation] = dataclasses.field(default_factory=dict)
    transfer: Transfers = dataclasses.field(default_factory=Transfers)  # joins the protocols
    protocols: dict[str, Protocol] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    gpus: int = 0  # per job; 0: one process on what the tools choose
    baseline: str = "ce"  # every Δ refers to it
    columns: list[str] = dataclasses.field(default_factory=list)  # []: Table 5's
    references: list[str] = dataclasses.field(default_factory=list)  # published tables; []: any
    images: int = 6  # validation images in the page
    score: float = 0.5  # predictions below it are not drawn
    slurm: Slurm = dataclasses.field(default_factory=Slurm)  # for --executor slurm


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and check a suite.

    Raises:
        InputError: unknown key, wrong type, nothing to run, or an invalid baseline, name or seed.
    """
    suite = load_config(Suite, path, overrides, folder="suites")
    where = str(path)
    protocols = _protocols(suite.transfer)
    for name, protocol in suite.protocols.items():
        pair = protocols.get(name)
        if pair and protocol.config:
            raise InputError(f"{where}: {name!r} is both a protocol and a pair of transfer")
        protocols[name] = _changed(pair, protocol) if pair else protocol
    suite = dataclasses.replace(suite, protocols=protocols, transfer=Transfers())
    if not suite.initialisations or not suite.protocols or not suite.seeds:
        raise InputError(f"{where} needs at least one initialisation, one protocol and one seed")
    if len(set(suite.seeds)) < len(suite.seeds) or min(suite.seeds) < 0:
        raise InputError(f"{where}: seeds {suite.seeds} must be different and not negative")
    if suite.baseline not in suite.initialisations:
        hint = nearest(suite.baseline, list(suite.initialisations))
        raise InputError(
            f"{where}: baseline {suite.baseline!r} is not one of its initialisations{hint}"
        )
    for name in suite.references:
        if name not in load_reference().tables:
            hint = nearest(name, list(load_reference().tables))
            raise InputError(f"{where}: references {name!r} is not a published table{hint}")
    for kind, names in (("initialisation", suite.initialisations), ("protocol", suite.protocols)):
        for name in names:
            if not _names_folder(name):
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
        if step_of(protocol) not in STEPS:
            raise InputError(f"{where}: protocol {name!r} needs a step, one of {', '.join(STEPS)}")
    return suite


def step_of(protocol: Protocol) -> str:
    """Return "detection" or "transfer": as declared, else by the config's folder."""
    return protocol.step or next((s for s in STEPS if s in Path(protocol.config).parts[:-1]), "")


def _protocols(transfer: Transfers) -> dict[str, Protocol]:
    return {
        f"{data}_{name}": Protocol(
            config=f"transfer/{data}_{name}.yaml",
            step="transfer",
            overrides=dict(transfer.overrides),
            minutes=transfer.minutes.get(name, 0.0),
            gigabytes=transfer.gigabytes.get(name, 0.0),
        )
        for name in transfer.protocols
        for data in transfer.data
    }


def _changed(pair: Protocol, protocol: Protocol) -> Protocol:
    """Return a pair with what an entry of its name under ``protocols`` changes of it."""
    return dataclasses.replace(
        pair,
        overrides=pair.overrides | protocol.overrides,
        arguments=protocol.arguments,
        minutes=protocol.minutes or pair.minutes,
        gigabytes=protocol.gigabytes or pair.gigabytes,
    )


def table_options(suite: Suite) -> Options:
    """Return the options of the suite's tables."""
    return Options(
        baseline=suite.baseline,
        order=tuple(suite.initialisations),
        labels={name: init.label for name, init in suite.initialisations.items() if init.label},
        columns=tuple(suite.columns),
        references=tuple(suite.references),
        expected={name: len(suite.seeds) for name in suite.initialisations},
    )


def _names_folder(name: str) -> bool:
    clean = bool(name) and name[0] not in ".-" and not any(c in name for c in "/\\:*?\n")
    return clean and name not in RESERVED
