"""What a detection run is: what tells its rows apart, and what an earlier start has recorded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from core.errors import InputError
from core.identity import data_digest
from core.results import sha256_of
from detection import cfg as configs
from detection import weights as weight_files
from detection.backbones import uses_network
from detection.data import Split
from detection.weights import Weights

RUN_FILE = "run.json"


def identity_of(
    init: str,
    cfg: CfgNode,
    weights: Weights | None,
    val: Split,
    data: str,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the fields that identify result rows.

    Args:
        init: name of the initialisation as the user gives it; "": as the weights call themselves.
        data: see ``data_of``.
        earlier: what a run that is resumed has recorded; its fields stay.
    """
    if earlier is not None:
        return dict(earlier["identity"])
    own = (weights.facts.get("detection") if weights else None) or {}
    identity = {
        "protocol": cfg.SUITE.PROTOCOL,
        "dataset": val.name,
        "split": val.split,
        "init": init or _init_name(weights, cfg),
        "seed": cfg.SEED,
        "epoch": weights.facts.get("epoch") if weights else None,
        "weights": weights.sha256 if weights else "",
        "weights_path": str(weights.path) if weights else "",
        "config": configs.hash_of(cfg),
        "data": data,
        "version": cfg.SUITE.VERSION,
    }
    if own:  # a detector of ours: what was trained is what it says, whatever config evaluates it
        at_test = {k: v for k, v in configs.changed_keys(cfg, own["config"]).items() if _at_test(k)}
        trained = {k: own[k] for k in ("init", "seed", "epoch", "weights", "weights_path")}
        identity |= trained | {"protocol": own["protocol"], "version": own.get("version", 1)}
        identity["data"] = own.get("data", "").partition("/")[0] + data
        if at_test:
            cfg.SUITE.PROTOCOL = own["protocol"]
            identity["protocol"] = configs.protocol_name(cfg, at_test)
    return identity


def data_of(train: Sequence[Split], val: Split) -> str:
    """Return which annotations are learned from and evaluated on, whatever they are called.

    Returns:
        ``TRAIN/VAL``, 12 hex digits of a sha256 each; no TRAIN where nothing is trained.
    """
    return data_digest([_content(split) for split in train], [_content(val)])


def _content(split: Split) -> str:
    """Return a sha256 of the json, or a digest of the annotation files of a kind that has none."""
    return split.digest or sha256_of(split.json)


def _init_name(weights: Weights | None, cfg: CfgNode) -> str:
    """Return how rows call the initialisation; that of a network is called by its architecture."""
    facts = weights.facts if weights else {"method": "random"}
    name = str(facts.get("method") or (weights and weights.path.stem.removesuffix("_d2")))
    arch = Path(cfg.MODEL.NETWORK.ARCH if uses_network(cfg) else "").name.replace(":", "_")
    return name if arch.partition(".")[0] in name else f"{name}_{arch}"


def _at_test(key: str) -> bool:
    """Whether a key acts when a trained detector is evaluated."""
    return key.startswith(("MODEL.", "TEST.")) or key.endswith("_TEST")


def facts_of(cfg: CfgNode, identity: dict[str, Any], val: Split) -> dict[str, Any]:
    """Return what the checkpoints of a run say of themselves."""
    own = {k: identity[k] for k in ("protocol", "init", "seed", "epoch", "weights", "weights_path")}
    own["data"] = identity.get("data", "")  # unknown in a run that was begun without it
    own["version"] = identity.get("version", 1)
    return {
        **weight_files.config_convention(cfg),
        **({"arch": cfg.MODEL.NETWORK.ARCH} if uses_network(cfg) else {}),
        "classes": list(val.classes),
        "detection": {**own, "config": configs.protocol_keys(cfg)},
    }


def read_run(cfg: CfgNode, data: str) -> dict[str, Any]:
    """Return what an earlier start of the run in OUTPUT_DIR recorded, which is to be resumed.

    Raises:
        InputError: there is none, or it has another protocol, seed or annotations.
    """
    if not cfg.OUTPUT_DIR:
        raise InputError("--resume needs --output (or OUTPUT_DIR): the folder of the run")
    path = Path(cfg.OUTPUT_DIR) / RUN_FILE
    if not path.is_file():
        raise InputError(
            f"--resume: {cfg.OUTPUT_DIR} holds no run to go on with; start it without --resume"
        )
    try:
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    if not _is_record(earlier):
        raise InputError(
            f"--resume: {path} is damaged; start anew in another folder (--eval-only --weights "
            f"{cfg.OUTPUT_DIR}/model_final.pth evaluates what has been trained)"
        )
    old = earlier["facts"]["detection"]
    changed = configs.changed_keys(cfg, old["config"])
    if changed or old["seed"] != cfg.SEED:
        key = next(iter(changed), "SEED")
        raise InputError(
            f"--resume: the run in {cfg.OUTPUT_DIR} was started with another {key}; resume it with "
            "its own config, or start anew in another folder"
        )
    began = earlier["identity"].get("data") or data  # unknown in a run that was begun without it
    for split, old, new in zip(("train", "val"), began.split("/"), data.split("/"), strict=True):
        if old != new:
            raise InputError(
                f"--resume: the {split} annotations are not those that the run in {cfg.OUTPUT_DIR} "
                f"was started with (sha256 {new}…, not {old}…): give those, or start anew in "
                "another folder"
            )
    return earlier


def _is_record(content: Any) -> bool:
    """Whether the content of a RUN_FILE has what a resume reads."""
    try:
        own, identity = content["facts"]["detection"], content["identity"]
        texts = [content["weights_file"], *(identity[k] for k in ("weights", "weights_path"))]
        texts += [identity.get("data") or "/", identity["protocol"], identity["init"]]
        return (
            isinstance(own["config"], dict)
            and isinstance(own["seed"], int)
            and all(isinstance(text, str) for text in texts)
            and texts[3].count("/") == 1
        )
    except (KeyError, TypeError, AttributeError):
        return False


def check_same_weights(earlier: dict[str, Any], given: Weights) -> None:
    """Raise InputError unless the weights are those that a run to be resumed was started from."""
    old = earlier["identity"]
    if given.sha256 != old["weights"]:
        raise InputError(
            f"--resume: the run was started from {old['weights_path'] or 'random initialisation'}, "
            f"not from {given.path} (another sha256): leave --weights out, or start anew in "
            "another folder"
        )
