"""Find the complete backbones in a checkpoint, choose one, and account for what lies beside it.

A file is nested dicts; a dict with other things than dicts in it is a state dict; every dotted
prefix of its names is a subtree. Each family of architectures answers one question, whether a
subtree is a complete backbone (``FAMILIES``), so that the place of a backbone,
``state_dict.encoder_q`` say, is found and need not be known. Equal backbones count once.
"""

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from convert import layouts, sources

Family = Callable[[Mapping[str, Any]], layouts.Match | None]
FAMILIES: tuple[Family, ...] = (layouts.match,)
WRAPPERS = {  # segments of names that DDP, torch.compile, FSDP, checkpointing and Lightning insert
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "_forward_module",
}  # fmt: skip
NORMALIZER = re.compile(r"(?:normaliz(?:e|er|ation))\.(?:new_)?(mean|std)")


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A complete backbone, and the state dict that it lies in; names are without wrappers."""

    path: tuple[str, ...]  # keys that lead to the state dict
    state: Mapping[str, Any]
    prefix: str  # with its last dot
    match: layouts.Match

    @property
    def place(self) -> str:
        return ".".join([*self.path, *self.prefix.split(".")[:-1]])

    @property
    def tensors(self) -> dict[str, Any]:
        if self.match.values is not None:
            return dict(self.match.values)
        return {known: self.state[self.prefix + n] for known, n in self.match.tensors.items()}

    @property
    def names(self) -> set[str]:
        return {self.prefix + n for n in (*self.match.tensors.values(), *self.match.counters)}


@dataclasses.dataclass(frozen=True)
class Found:
    """A backbone as it was found; ``tensors`` has the family's names and the file's own values."""

    arch: str
    spelling: str  # a key of names.TO_TORCHVISION
    format: str  # a key of sources.FORMATS
    place: str  # where it lies, as --prefix takes it; "" is the file itself
    tensors: dict[str, Any]  # without batch counters
    dropped: tuple[str, ...]  # places of what else lies in its state dict
    counters: int  # num_batches_tracked of the backbone, left behind too
    aside: tuple[str, ...]  # what else the file holds at its top level: epoch, optimizer, …
    normalizer: dict[str, Any]  # mean and std of a normalisation that lies beside it, or empty
    notes: dict[str, Any]  # what the family says besides


def find(
    content: Any,
    *,
    format: str | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    families: Sequence[Family] = FAMILIES,
) -> Found:
    """Return the backbone in what was read from a checkpoint file.

    Args:
        content: nested dicts, as unpickled.
        format: the required format, by its name.
        prefix: the place of the wanted backbone, or a part of it, where a file has several.
        drop: further patterns of names to leave behind.
        families: the architectures that are looked for.

    Raises:
        ValueError: no complete backbone, or several that differ; an input convention that the file
            does not state; a tensor that is neither of the backbone nor known to be dropped.
    """
    if format is not None and format not in sources.FORMATS:
        raise ValueError(f"format {format!r} is unknown; known are {', '.join(sources.FORMATS)}")
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    candidates, misses = _candidates(content, families)
    if not candidates:
        raise ValueError(_why_none(content, misses, families is FAMILIES))
    if misses and prefix is None:  # a teacher that lacks a tensor is no reason to take the student
        raise ValueError(
            f"{misses[0]}; complete backbones: {_places(candidates)}; select one with --prefix"
        )
    chosen = _choose(candidates if prefix is None else _at(candidates, prefix))
    dropped, normalizer = _account(chosen, candidates, drop)
    return Found(
        chosen.match.arch,
        chosen.match.spelling,
        _format(content, chosen, format),
        chosen.place,
        chosen.tensors,
        tuple(".".join([*chosen.path, name]) for name in dropped),
        len(chosen.match.counters),
        tuple(str(key) for key in content if chosen.path and str(key) != chosen.path[0]),
        normalizer,
        dict(chosen.match.notes),
    )


def relative(name: str, prefix: str) -> str:
    """Return a name without the leading segments that it shares with a prefix."""
    parts = name.split(".")
    for shared in prefix.split("."):
        if len(parts) == 1 or parts[0] != shared:
            break
        parts.pop(0)
    return ".".join(parts)


def _candidates(
    content: Mapping[Any, Any], families: Sequence[Family]
) -> tuple[list[_Candidate], list[str]]:
    """Return the complete backbones, and why each other subtree that looks like one is none."""
    found: list[_Candidate] = []
    misses: list[tuple[str, Mapping[str, Any], str]] = []  # prefix, state dict and reason
    for path, state in states(content):
        for prefix, subtree in subtrees(state).items():
            for family in families:
                try:
                    match = family(subtree)
                except ValueError as error:
                    place = ".".join([*path, *prefix.split(".")[:-1]])
                    misses.append((prefix, state, f"{place}: {error}" if place else str(error)))
                    continue
                if match is not None:
                    found.append(_Candidate(path, state, prefix, match))
                    break

    def is_part(prefix: str, state: Mapping[str, Any]) -> bool:  # of a backbone in another layout
        names = (name for c in found if c.state is state and c.prefix != prefix for name in c.names)
        return any(name.startswith(prefix) for name in names)

    return found, [why for prefix, state, why in misses if not is_part(prefix, state)]


def states(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each state dict of a file, and the keys that lead to it; one that occurs twice counts once.

    Names are without wrappers; a C4 detector's last stage is put beside its other stages.
    """
    mappings: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen: set[int] = set()
    for path, mapping in mappings:  # grows on the way
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        state: dict[str, Any] = {}
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                mappings.append(((*path, str(key)), value))
                continue
            name = _unwrapped(str(key))
            if name.startswith("roi_heads.res5."):
                name = name.replace("roi_heads", "backbone", 1)
            if name in state:
                raise ValueError(f"{key} occurs twice, but for the names of wrappers")
            state[name] = value
        if state:
            yield path, state


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def subtrees(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every subtree by its prefix: values by their names below the prefix."""
    subtrees: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, value in state.items():
        subtrees[""][name] = value
        for dot in re.finditer(r"\.", name):
            subtrees[name[: dot.end()]][name[dot.end() :]] = value
    return subtrees


def _at(candidates: list[_Candidate], prefix: str) -> list[_Candidate]:
    """The candidates at a place: exactly there, or else with these segments in their place."""
    wanted = _unwrapped(prefix.strip("."))
    at = [c for c in candidates if c.place == wanted]
    at = at or [c for c in candidates if wanted and f".{wanted}." in f".{c.place}."]
    if not at:
        raise ValueError(f"no complete backbone lies at --prefix {prefix}: {_places(candidates)}")
    return at


def _choose(candidates: list[_Candidate]) -> _Candidate:
    """The only backbone, equal ones counting once, or the one that is preferred to all others."""
    groups: list[list[_Candidate]] = []
    for candidate in candidates:
        for group in groups:
            if _equal(group[0].tensors, candidate.tensors):
                group.append(candidate)
                break
        else:
            groups.append([candidate])
    best = [g for g in groups if all(_preferred(g, other) for other in groups if other is not g)]
    if len(best) == 1:
        return best[0][0]
    raise ValueError(
        f"it holds {len(groups)} different backbones: say which with --prefix "
        f"({_places([group[0] for group in groups])})"
    )


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[key] is b[key] or (a[key].shape == b[key].shape and bool((a[key] == b[key]).all()))
        for key in a
    )


def _preferred(group: Sequence[_Candidate], other: Sequence[_Candidate]) -> bool:
    places = {candidate.place for candidate in other}
    return any(
        re.search(pattern, candidate.place)
        and re.sub(pattern, replacement, candidate.place, count=1) in places
        for candidate in group
        for pattern, replacement in sources.PREFERENCES
    )


def _places(candidates: Sequence[_Candidate]) -> str:
    return " | ".join(c.place or '""' for c in candidates)


def _account(
    chosen: _Candidate, candidates: Sequence[_Candidate], drop: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """Return what is dropped beside a backbone, and the mean and std of a normalisation.

    Of a backbone that was not chosen, all is dropped that lies below the first segment by which
    its place differs, as encoder_k's head does.

    Raises:
        ValueError: there is something that is not known to be dropped.
    """
    known_heads = sources.BLOBS if chosen.match.spelling == "caffe2" else sources.HEADS
    heads = (*known_heads, *chosen.match.beside)
    modules, used, others = [], chosen.names, set[str]()
    for other in candidates:
        same = not other.names.isdisjoint(chosen.names)  # in another layout
        if other.state is chosen.state and other is not chosen and not same:
            others |= other.names
            if below := relative(other.prefix, chosen.prefix):  # else chosen lies inside of it
                modules.append(other.prefix.removesuffix(below) + below.partition(".")[0] + ".")
    dropped: list[str] = []
    extra: list[str] = []
    normalizer: dict[str, Any] = {}
    for name, value in chosen.state.items():
        if name in used:
            continue
        short = relative(name, chosen.prefix)
        statistic = NORMALIZER.fullmatch(short)
        if statistic and isinstance(value, torch.Tensor):
            normalizer[statistic[1]] = value
        known = (
            statistic
            or name in others
            or name.startswith(tuple(modules))
            or matches((short, sources.TWIN.sub("", short)), heads)
            or matches((short, name), drop)
        )
        if short.startswith("classifier.") and len(getattr(value, "shape", ())) == 4:
            known = matches((short, name), drop)  # torchvision's segmentation, or one like it
        (dropped if known else extra).append(name)
    if extra:
        raise ValueError(
            f"{len(extra)} entries are neither of the backbone ({chosen.place or 'top level'}) "
            f"nor known to be dropped: {_some(extra)}; if they are no part of the backbone, name "
            "them with --drop"
        )
    return dropped, normalizer if len(normalizer) == 2 else {}


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether one of several spellings of a name, or a module it lies in, is among patterns."""
    wanted = [p for pattern in patterns for p in (pattern, f"{pattern}.*")]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in wanted)


def _format(content: Mapping[str, Any], chosen: _Candidate, format: str | None) -> str:
    """Return the required format, or the only one that fits."""
    spelling = chosen.match.spelling
    fits = sources.formats_of(content, spelling, chosen.state, chosen.tensors)
    if format is not None:
        allowed = sources.FORMATS[format]
        if spelling not in allowed.spellings or (format in sources.STATING and format not in fits):
            raise ValueError(f"it is not of the format {format} ({allowed.about})")
        return format
    if not fits:
        raise ValueError("no known format has its pixel_mean and pixel_std: say --format")
    if len(fits) > 1:
        raise ValueError(
            f"it could be {' or '.join(fits)}, which differ in how images enter: say which with "
            f"--format ({' | '.join(fits)})"
        )
    return fits[0]


def _why_none(content: Mapping[Any, Any], misses: Sequence[str], resnets: bool) -> str:
    """Say why no backbone was found, with what the file seems to be."""
    if not resnets:
        keys = f"it does not hold that network: its keys are {_some(list(content))}"
        return misses[0] if misses else keys
    names = [name for _, state in states(content) for name in state]
    if network := sources.reason(sources.OTHERS, names):
        return f"it is {network}, no ResNet that detectron2 can hold"
    if misses:
        return misses[0]
    return f"it holds no ResNet: its keys are {_some(list(content))}"


def _some(keys: Sequence[Any], count: int = 4) -> str:
    more = ", …" if len(keys) > count else ""
    return ", ".join(map(str, keys[:count])) + more if keys else "none at all"
