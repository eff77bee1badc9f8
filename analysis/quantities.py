"""The quantities of a timeline: from one epoch's features on one data set to named numbers.

Shapes: ``N`` images of a split, ``D`` embedding, ``n`` pairs of an information estimate.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from analysis.clustering import NORMALISATION, cluster_nmi
from analysis.features import effective_rank, feature_norm
from analysis.mutual_information import (
    ESTIMATORS,
    Estimate,
    Settings,
    estimate_jobs,
)
from analysis.retrieval import recall_at_1
from core.errors import InputError
from core.results import Measured
from transfer.linear import LinearConfig, linear_probe

PER_SPLIT = ("retrieval", "clustering", "companions")
PER_DATASET = ("probe",)
INFORMATION = ("mi_xt", "mi_ty", "h_t")  # over neighbouring epochs at once
QUANTITIES = (*PER_SPLIT, *PER_DATASET, *INFORMATION)
HELD_OUT = "C chosen on a part held out of train"  # the probe's selection


@dataclasses.dataclass(frozen=True)
class Information:
    """How mutual informations are estimated; critics, lr and lengths are the released code's."""

    estimators: list[str] = dataclasses.field(default_factory=lambda: ["mine"])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    split: str = "test"  # whose pairs: train, test (the released code's), or all of both
    pairs: int = 10_000  # at most; spread evenly over the split
    side: int = 32  # X is the image averaged down to this side, pixels; 0: as the network sees it
    epochs_at_once: int = 8  # critics trained side by side on a GPU; a CPU has nothing to gain
    reference_epoch: int = -1  # H(T): whose features are T1; −1: the end of stage 1, or the last
    xt: Settings = dataclasses.field(default_factory=Settings)
    ty: Settings = dataclasses.field(default_factory=lambda: Settings(lr=1e-5, iterations=20_000))
    ht: Settings = dataclasses.field(  # InfoNCE; nothing is published, so this is own choice
        default_factory=lambda: Settings(batch=1000, iterations=5000, lr=3e-4)
    )


def check(information: Information) -> None:
    """Validate the settings of information estimates.

    Raises:
        InputError: naming the key and what would be right.
    """
    unknown = [name for name in information.estimators if name not in ESTIMATORS]
    if unknown or not information.estimators:
        known = ", ".join(ESTIMATORS)
        raise InputError(f"information.estimators is {information.estimators}; known are {known}")
    if information.split not in ("train", "test", "all"):
        raise InputError(f"information.split {information.split!r} is not one of train, test, all")
    if information.pairs < 20 or information.epochs_at_once < 1 or information.side < 0:
        raise InputError(
            "information.pairs must be at least 20, epochs_at_once at least 1, side 0+"
        )
    if not information.seeds:
        raise InputError("information.seeds is empty; one seed is the least, three give a std")


def metrics_of(quantity: str, information: Information) -> list[str]:
    """Return the metrics that a quantity gives on the split that was asked for."""
    fixed = {
        "retrieval": ["recall@1"],
        "clustering": ["nmi"],
        "companions": ["effective_rank", "feature_norm"],
        "probe": ["linear/top1"],
        "h_t": ["h_t_bound"],
    }
    if quantity in fixed:
        return fixed[quantity]
    return [information_metric(quantity, estimator) for estimator in information.estimators]


def information_metric(quantity: str, estimator: str) -> str:
    """Return the metric of an estimator: MINE's has the plain name, others have their own added."""
    if quantity == "h_t":
        return "h_t_bound"
    return quantity if estimator == "mine" else f"{quantity}/{estimator}"


def measure_split(
    quantity: str, features: Tensor, labels: Tensor, seeds: Sequence[int], device: torch.device
) -> list[Measured]:
    """Return the numbers of one of ``PER_SPLIT`` on N×D features."""
    if quantity == "retrieval":
        found = recall_at_1(features.to(device), labels)
        return [Measured(100 * found, "recall@1")]
    if quantity == "clustering":
        clusters = cluster_nmi(features, labels, seeds)
        details = {
            "std": clusters.std, "values": clusters.values, "clusters": clusters.clusters,
            "normalisation": NORMALISATION,
        }  # fmt: skip
        return [Measured(clusters.nmi, "nmi", "1", details=details)]
    return [
        Measured(effective_rank(features), "effective_rank", "1"),
        Measured(feature_norm(features), "feature_norm", "1"),
    ]


def measure_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    config: LinearConfig,
    device: torch.device,
) -> list[Measured]:
    """Return the linear probe's top-1 on test and, as the fit's own score, on train."""
    probe = linear_probe(train, test, classes, config, device=device)
    with torch.no_grad():
        logits = probe.fit.logits(_normalised(train[0], config).to(device))
    fitted = 100 * float((logits.argmax(1).cpu() == train[1]).float().mean())
    details = {
        "c": probe.c, "held_out": probe.held_out_score, "at_grid_edge": probe.at_grid_edge,
        "converged": probe.fit.converged,
    }  # fmt: skip
    return [
        Measured(probe.score, "linear/top1", selection=HELD_OUT, details=details),
        Measured(fitted, "linear/top1", split="train", selection=HELD_OUT, details=details),
    ]


def measure_information(
    quantity: str, side: Tensor, features: Sequence[Tensor], how: Information
) -> list[list[Measured]]:
    """Return the estimates of neighbouring epochs, whose critics train side by side.

    Args:
        quantity: mi_xt, mi_ty or h_t.
        side: n×3s² images, n labels, or n×D features of the reference network.
        features: one n×D for each epoch, on the device of ``side``.
    """
    settings = {"mi_xt": how.xt, "mi_ty": how.ty, "h_t": how.ht}[quantity]
    estimators = ["infonce"] if quantity == "h_t" else how.estimators
    results: list[list[Measured]] = [[] for _ in features]
    for estimator in estimators:
        found = estimate_jobs(side, features, estimator, settings, how.seeds)
        for result, one in zip(results, found, strict=True):
            result.append(_named(quantity, estimator, settings, one, len(side)))
    return results


def _named(
    quantity: str, estimator: str, settings: Settings, found: Estimate, pairs: int
) -> Measured:
    metric = information_metric(quantity, estimator)
    details: dict[str, Any] = {
        "estimator": estimator, "protocol": settings.protocol, "pairs": pairs, "std": found.std,
        "standard_error": found.standard_error, "values": found.values,
    }  # fmt: skip
    if found.cap is not None:
        details["cap"] = found.cap  # log N: no estimate can pass it
    return Measured(found.nats, metric, "nat", details=details)


def _normalised(features: Tensor, config: LinearConfig) -> Tensor:
    return torch.nn.functional.normalize(features) if config.normalise == "l2" else features
