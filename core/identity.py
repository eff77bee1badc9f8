"""Which numbers may be compared: the recipe, data and protocol version that a number came from.

Two rows are trials of one experiment if and only if their ``identity`` is equal. It joins the
hash of the recipe (defaults included, without the keys that no number depends on), a digest of the
content of the data, and the protocol's version, an integer that is raised when what the protocol
computes changes. It holds no commit: two trials are often measured at different ones.
This module imports no torch, so that reports and suites can ask it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from core.errors import InputError

if TYPE_CHECKING:
    from core.results import ResultRow

DIGITS = 12  # hex digits of a hash in a row: 48 bits
UNKNOWN = "unknown identity: written before rows recorded recipe, data and version"
FIRST_KNOWN_SCHEMA = 2  # rows of schema 1 have no recipe hash or data digest to rely on

# Keys that no number depends on, wherever they stand in a recipe; an entry also covers what is
# below it. Data are known by their digest and not by a folder, a trial by its seed. "version" is a
# field of the row.
NEUTRAL = (
    # of this project's recipes
    "recipe",
    "init",
    "seed",
    "version",
    "device",
    "timeout",
    "root",
    "workers",
    "cache",
    "save_every",
    "resume_every",
    "eval_every",
    "log_every",
    "features.batch_size",
    "epochs_at_once",
    # of detectron2's configs; the input convention (mean, std, order, stride) belongs to the
    # weights and is checked against them, numbers of classes to the data
    "OUTPUT_DIR",
    "SEED",
    "VERSION",
    "CUDNN_BENCHMARK",
    "VIS_PERIOD",
    "DATASETS",
    "SUITE",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "MODEL.NETWORK.ARCH",  # belongs to the weights, as the row's init and details do
    "MODEL.WEIGHTS",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CLASSES",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "INPUT.FORMAT",
    "INPUT.MASK_FORMAT",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
)

# Keys that were added after rows had been written, with the value that computes what was computed
# before. At that value they are left out of the hash, so that rows of before and after meet.
ADDED: dict[str, Any] = {
    "drop_path_rate": 0.0,
    "MODEL.NETWORK.DROP_PATH": 0.0,
    "MODEL.NETWORK.NORM": "",
    "MODEL.NETWORK.OUT_NORM": "",
    "MODEL.NETWORK.SQUARE_PAD": 0,
    "SOLVER.LAYER_DECAY": 1.0,
    "SOLVER.LAYERS": [],
}


def is_neutral(key: str) -> bool:
    """Whether no number depends on a dotted key: ``data.root``, ``targets.0.workers``, ``SEED``."""
    parts = key.split(".")
    spans = {
        ".".join(parts[first:last])
        for first in range(len(parts))
        for last in range(first + 1, len(parts) + 1)
    }
    return not spans.isdisjoint(NEUTRAL)


def effective(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a recipe under dotted keys, without the neutral ones.

    Args:
        recipe: resolved, as nested mappings or dotted keys; only the groups that are read: a
            cross-entropy run does not depend on ``ctc``.
    """
    return {
        key: value
        for key, value in _leaves(recipe)
        if not is_neutral(key) and not (key in ADDED and value == ADDED[key])
    }


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Return a hash (12 hex digits) of ``effective(recipe)``; the order of keys does not count."""
    return _digest(json.dumps(effective(recipe), sort_keys=True, default=str))


def changed_keys(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``effective(new)`` that differ from those of ``old``, with their values.

    A key that only ``old`` has counts as changed to None.
    """
    mine, its = (json.loads(json.dumps(effective(r), default=str)) for r in (new, old))
    return {k: mine.get(k) for k in {**mine, **its} if k not in its or mine.get(k) != its[k]}


def protocol_name(name: str, changed: Mapping[str, Any]) -> str:
    """Return how rows name a protocol of which some keys were changed: ``linear+1a2b3c``.

    Equal changes share a name, and none of them that of the unchanged protocol.
    """
    return f"{name}+{recipe_hash(changed)[:6]}" if changed else name


def check_version(version: int) -> None:
    """Raise InputError unless a protocol's version is 1 or more (0 is that of unknown rows)."""
    if version < 1:
        raise InputError(f"version is {version}; a protocol's version is 1 or more")


def data_digest(learned: Sequence[str], evaluated: Sequence[str]) -> str:
    """Return ``LEARNED/EVALUATED``, 12 hex digits each, of the digests of their splits.

    Args:
        learned: digests of the splits that are trained on; empty: nothing is, and that part is "".
        evaluated: of the splits that the number is measured on.
    """
    return "/".join(_digest("\n".join(part)) if part else "" for part in (learned, evaluated))


class Identity(NamedTuple):
    """What the trials of one experiment share, beside the initialisation that they compare."""

    step: str
    protocol: str
    version: int  # 0: unknown
    config: str
    data: str
    dataset: str
    split: str
    selection: str
    metric: str
    code: str = ""  # of a row of unknown identity: nothing else says what computed it

    @property
    def known(self) -> bool:
        """Whether recipe, data and version are known; unknown ones only equal each other."""
        return self.version > 0


def identity(row: "ResultRow") -> Identity:
    """Return what a row shares with the other trials of its experiment, and with no other row.

    Rows written before schema 2 are of unknown identity: they never equal a known one.
    """
    known = row.schema >= FIRST_KNOWN_SCHEMA
    return Identity(
        row.step,
        row.protocol,
        row.version if known else 0,
        row.config if known or row.step == "detection" else "",  # else it hashed seed and folders
        row.data,
        row.dataset,
        row.split,
        row.selection,
        row.metric,
        "" if known else row.code,
    )


def measurement(row: "ResultRow") -> tuple[Any, ...]:
    """Return what only a repetition of the same measurement shares: its newest row counts."""
    experiment = identity(row)._replace(code="")
    return (experiment, row.weights, row.init, row.seed, row.epoch)


def done(rows: Iterable["ResultRow"], wanted: Iterable["ResultRow"]) -> bool:
    """Whether there is a row of each wanted measurement.

    Args:
        wanted: rows as they would be written; their values and details are not read.
    """
    return {measurement(row) for row in wanted} <= {measurement(row) for row in rows}


def announcement(configs: Iterable[str], data: str, version: int) -> str:
    """Return the line by which ``--dry-run`` says which identity its rows would have."""
    return f"identity: {json.dumps({'config': [*configs], 'data': [data], 'version': [version]})}"


def announced(text: str) -> dict[str, list[Any]] | None:
    """Return config, data and version from the output of a ``--dry-run``, None if it has none."""
    line = re.search(r"identity: (\{.*\})", text)
    return json.loads(line[1]) if line else None


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value); mappings in a list are under their position."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple) and any(isinstance(part, Mapping) for part in node):
        yield from _leaves(dict(enumerate(node)), prefix)
    else:
        yield prefix, node


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
