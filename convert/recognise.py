"""Recognise a checkpoint's format, pick its backbone out of it, and account for every tensor.

Acts only on what the table of formats knows, and fails on anything that is left over. Nested
dicts in, torchvision names out; values are only looked at for their shape, or compared where two
formats would pick different ones.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from convert import names
from convert.refusals import reason_of
from convert.sources import BY_NAME, HEADS, SOURCES, WRAPPERS, Source

ANCHORS = {  # two tensors that tell a style of names, however much else is missing
    "torchvision": ("conv1.weight", "layer1.0.conv1.weight"),
    "detectron2": ("stem.conv1.weight", "res2.0.conv1.weight"),
    "caffe2": ("conv1_w", "res2_0_branch2a_w"),
    "numbered": ("0.weight", "4.0.conv1.weight"),
}
RENAMES: dict[str, Callable[[str], str]] = {
    "torchvision": names.from_torchvision,
    "detectron2": names.to_torchvision,
    "caffe2": names.from_caffe2,
    "numbered": names.from_numbered,
}


@dataclasses.dataclass(frozen=True)
class Recognition:
    """A backbone as it was found; ``tensors`` has torchvision names and the file's own values."""

    source: Source
    container: tuple[str, ...]
    prefix: str
    style: str
    tensors: dict[str, Any]  # without batch counters
    dropped: tuple[str, ...]  # names, as in the file, of what was left behind
    counters: int  # num_batches_tracked of the backbone, left behind too
    aside: tuple[str, ...] = ()  # what else the file holds at its top level: epoch, optimizer, …
    stem_bias: Any = None  # Caffe2's conv1_b, which belongs to the backbone but has no name


@dataclasses.dataclass(frozen=True)
class _Candidate:
    source: Source
    container: tuple[str, ...]
    state: dict[str, Any]  # clean key → value
    original: dict[str, str]  # clean key → key as in the file
    prefix: str
    style: str


def recognise(content: Any, format: str | None = None, drop: Sequence[str] = ()) -> Recognition:
    """Return the backbone in what was read from a checkpoint file.

    Args:
        content: nested dicts, as unpickled.
        format: the name of a format to insist on.
        drop: further patterns of names to leave behind.

    Raises:
        ValueError: no format fits, or several that disagree, or a tensor that is neither of the
            backbone nor known to be dropped.
    """
    if format is not None and format not in BY_NAME:
        raise ValueError(f"format {format!r} is unknown; known are {', '.join(BY_NAME)}")
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    sources = [BY_NAME[format]] if format else [s for s in SOURCES if not s.on_request]
    candidates = list(_candidates(content, sources, check=format is None))
    if not candidates:
        raise ValueError(_why_not(content, format))
    found = _select(_agreed(candidates), drop)
    if not found.container:
        return found
    aside = tuple(str(key) for key in content if key != found.container[0])
    return dataclasses.replace(found, aside=aside)


def _candidates(
    content: Mapping[str, Any], sources: Sequence[Source], check: bool
) -> Iterator[_Candidate]:
    """Every (format, container, prefix, style) whose anchors are there.

    ``check`` is off where the user insists on a format: then its ``detect`` is not asked.
    """
    cleaned: dict[tuple[tuple[str, ...], Any], tuple[dict[str, Any], dict[str, str]]] = {}
    for source in sources:
        for container in source.containers:
            state = _dig(content, container)
            if state is None:
                continue
            key = (container, source.aliases)
            if not _may_be_state(state):
                continue
            if key not in cleaned:
                cleaned[key] = _clean(state, source.aliases)
            clean, original = cleaned[key]
            if check and not source.detect(content, clean):
                continue
            for prefix in source.prefixes:
                for style in source.styles:
                    if all(prefix + anchor in clean for anchor in ANCHORS[style]):
                        yield _Candidate(source, container, clean, original, prefix, style)


def _agreed(candidates: list[_Candidate]) -> _Candidate:
    """The first candidate, if all pick the same tensors under the same input convention."""
    first = candidates[0]
    rivals = [c.source.name for c in candidates[1:] if not _same_choice(first, c)]
    if not rivals:
        return first
    if all(name == first.source.name for name in rivals):
        where = sorted({".".join((*c.container, c.prefix)) or "top level" for c in candidates})
        raise ValueError(
            f"it holds several different backbones ({', '.join(where)}), and the format "
            f"{first.source.name} does not say which is meant: save the wanted one alone"
        )
    choice = dict.fromkeys([first.source.name, *rivals])
    raise ValueError(
        f"it could be {' or '.join(choice)}, which differ in weights or input convention: say "
        f"which with --format ({' | '.join(choice)})"
    )


def _same_choice(a: _Candidate, b: _Candidate) -> bool:
    if a.source.convention != b.source.convention:
        return False
    if (a.container, a.prefix, a.style) == (b.container, b.prefix, b.style):
        return True
    ours, theirs = _backbone(a), _backbone(b)
    return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)


def _backbone(candidate: _Candidate) -> dict[str, Any]:
    tensors = {}
    for key, value in candidate.state.items():
        if key.startswith(candidate.prefix):
            name = _renamed(candidate.style, key.removeprefix(candidate.prefix))
            if name is not None and not name.endswith("num_batches_tracked"):
                tensors[name] = value
    return tensors


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return getattr(a, "shape", 0) == getattr(b, "shape", 1) and bool((a == b).all())


def _select(candidate: _Candidate, drop: Sequence[str]) -> Recognition:
    """Split a state dict into the backbone, what is dropped by name, and what must not be."""
    drops = (*HEADS, *candidate.source.drops, *drop)
    tensors: dict[str, Any] = {}
    dropped, extra, counters, stem_bias = [], [], 0, None
    for key, value in candidate.state.items():
        below = key.startswith(candidate.prefix)
        inner = key.removeprefix(candidate.prefix)  # what is not below the prefix keeps its name
        name = _renamed(candidate.style, inner) if below else None
        if name is not None and name.endswith("num_batches_tracked"):
            counters += 1
        elif name is not None:
            if name in tensors:
                raise ValueError(f"two of its tensors are {name}, one of them {key}")
            tensors[name] = value
        elif candidate.style == "caffe2" and inner == "conv1_b":
            stem_bias = value
        elif any(_matches(inner, pattern) for pattern in drops):
            dropped.append(candidate.original[key])
        else:
            extra.append(candidate.original[key])
    if extra:
        raise ValueError(_why_extra(extra, candidate.source.name))
    return Recognition(
        candidate.source,
        candidate.container,
        candidate.prefix,
        candidate.style,
        tensors,
        tuple(dropped),
        counters,
        stem_bias=stem_bias,
    )


def _renamed(style: str, name: str) -> str | None:
    try:
        return RENAMES[style](name)
    except ValueError:
        return None


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _dig(content: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    for key in path:
        inner = content.get(key)
        if not isinstance(inner, Mapping):
            return None
        content = inner
    return content


def _may_be_state(state: Mapping[Any, Any]) -> bool:
    """Whether a dict has a key that some anchor ends."""
    anchors = tuple(first for first, _ in ANCHORS.values())
    return any(isinstance(key, str) and key.endswith(anchors) for key in state)


def _clean(
    state: Mapping[str, Any], aliases: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Strip wrapper segments from the keys; two keys that become one are an error."""
    clean: dict[str, Any] = {}
    original: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is a key of its state dict, where names are wanted")
        short = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        for start, replacement in aliases:
            if short.startswith(start):
                short = replacement + short.removeprefix(start)
        if short in clean:
            raise ValueError(f"{key} and {original[short]} are the same tensor but for a wrapper")
        clean[short], original[short] = value, key
    return clean, original


def _why_not(content: Mapping[str, Any], format: str | None) -> str:
    """Say why no format fits, with what the file seems to be."""
    keys = list(_all_keys(content))
    reason = reason_of(keys)
    if reason:
        return f"it is {reason}" if reason.startswith("a vision") else f"it has {reason}"
    if format is not None:
        return (
            f"it is not of the format {format} ({BY_NAME[format].about}): its keys are "
            f"{_some(list(content))}"
        )
    prefixes = sorted(
        {
            k.removesuffix("layer1.0.conv1.weight")
            for k in keys
            if k.endswith("layer1.0.conv1.weight")
        }
    )
    if prefixes:
        return (
            f"a ResNet stands under {' and '.join(map(repr, prefixes))}, where no known format has "
            "one (see --list-formats)"
        )
    return f"no known format fits (see --list-formats): its keys are {_some(list(content))}"


def _why_extra(extra: list[str], format: str) -> str:
    reason = reason_of(extra)
    if reason:
        return f"it has {reason} ({extra[0]})"
    return (
        f"{len(extra)} entries are neither of the backbone nor known to be dropped in the format "
        f"{format}: {_some(extra)}; if they are no part of the backbone, name them with --drop"
    )


def _all_keys(content: Mapping[str, Any], prefix: str = "", depth: int = 5) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from _all_keys(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}"


def _some(keys: Sequence[Any], count: int = 4) -> str:
    more = ", …" if len(keys) > count else ""
    return ", ".join(map(str, keys[:count])) + more if keys else "none at all"
