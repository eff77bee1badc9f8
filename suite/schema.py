"""A suite as its YAML says it: initialisations, protocols, seeds; read, checked, typed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import InputError, load_config, nearest
from report.reference import load_reference
from report.tables import Options

METHODS = ("random", "ce", "ctc")
STEPS = ("detection", "transfer")
RESERVED = (
    "pretrain",
    "convert",
    "detection",
    "transfer",
    "weights",
    "jobs",
    "logs",
    "figures",
    "slurm",
)  # folders


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
    gigabytes: float = 0.0  # that its run writes, for --dry-run; 0: unknown
    label: str = ""  # in the tables; empty: the name


@dataclasses.dataclass  # not frozen, as above
class Protocol:
    """What is done with the weights."""

    config: str = ""  # detection or transfer config
    step: str = ""  # "detection" or "transfer"; empty: the config's folder says it
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # its KEY VALUE
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
    """What a SLURM job asks for; GPUs apart, which the suite or the command line says."""

    partition: str = ""  # empty: the cluster's default
    account: str = ""
    hours: float = 24.0  # then the job saves, is queued again and goes on
    cpus_per_gpu: int = 8  # also what a job without a GPU gets
    memory_gb: float = 0.0  # per machine; 0: the partition's default
    save_seconds: int = 120  # from the signal to save until SLURM ends the job
    requeues: int = 20  # after so many time-outs the job is not queued again
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of sbatch's options


@dataclasses.dataclass(frozen=True)
class Suite:
    """One table: which initialisations, under which protocols, with which seeds."""

    title: str = ""
    description: str = ""
    initialisations: dict[str, Initialisation] = dataclasses.field(default_factory=dict)
    transfer: Transfers = dataclasses.field(default_factory=Transfers)  # joins the protocols
    protocols: dict[str, Protocol] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    gpus: int = 0  # per job; 0: one process on what the tools choose
    baseline: str = "ce"  # every Δ refers to it
    columns: list[str] = dataclasses.field(default_factory=list)  # empty: Table 5's
    references: list[str] = dataclasses.field(default_factory=list)  # published tables; empty: any
    images: int = 6  # validation images in the page
    score: float = 0.5  # predictions below it are not drawn
    slurm: Slurm = dataclasses.field(default_factory=Slurm)  # for --executor slurm


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and check a suite.

    Raises:
        InputError: unknown key, wrong type, nothing to run, a baseline, name or seed that makes no
            sense.
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
        raise InputError(f"{where}: baseline {suite.baseline!r} is no initialisation of it{hint}")
    for name in suite.references:
        if name not in load_reference().tables:
            hint = nearest(name, list(load_reference().tables))
            raise InputError(f"{where}: references {name!r} is no published table{hint}")
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
    """Return "detection" or "transfer": as declared, else by the folder of the config."""
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
    """Return how the suite's tables are to look."""
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
