"""Typed configurations: dataclass schema, YAML differences over ``_BASE_``, ``KEY VALUE``.

A schema is a tree of dataclasses in which every key is declared once, with its type and default.
A YAML file holds only differences, over its ``_BASE_`` file if it names one. The command line
adds ``KEY VALUE`` pairs (detectron2's grammar). The result is checked and cannot be changed.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import InputError as InputError  # re-exported: report may import only this module
from core.files import atomic_file

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "configs"
BASE_KEY = "_BASE_"


def find_config(name: str | Path, folder: str = "") -> Path:
    """Return the file that ``name`` means: the path as given, or else under ``configs/``.

    Raises:
        InputError: neither exists; the sentence names the nearest files that do.
    """
    candidates = [Path(name).expanduser(), CONFIG_DIR / name, CONFIG_DIR / folder / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = [str(p.relative_to(CONFIG_DIR)) for p in sorted(CONFIG_DIR.rglob("*.yaml"))]
    hint = nearest(str(name), known)
    raise InputError(f"config {str(name)!r} is neither a file here nor under {CONFIG_DIR}{hint}")


def recipe_and_data(name: str, folder: str) -> tuple[Path, str]:
    """Return the config that ``name`` means, and the data set if the name says that too.

    ``transfer/cub200_finetune_448.yaml`` means ``transfer/finetune_448.yaml`` on cub200; the name
    ``X_finetune`` means ``X.yaml`` where data set X has a recipe of its own.

    Raises:
        InputError: as ``find_config``.
    """
    try:
        return find_config(name, folder), ""
    except InputError:
        recipes = [path.stem for path in (CONFIG_DIR / folder).glob("*.yaml")]
        ends = [recipe for recipe in recipes if Path(name).stem.endswith(f"_{recipe}")]
        if not ends or str(Path(name).parent) not in (".", folder):
            raise
    recipe = max(ends, key=len)
    data = Path(name).stem.removesuffix(f"_{recipe}")
    own = shipped_config(data, folder) if recipe == "finetune" else None
    return own or CONFIG_DIR / folder / f"{recipe}.yaml", data


def shipped_config(name: str, folder: str) -> Path | None:
    """Return ``configs/FOLDER/NAME.yaml``, None where this suite has no such recipe.

    A user's own file of that name, or with a protocol of that name, is compared with it.
    """
    path = CONFIG_DIR / folder / f"{name}.yaml"
    return path if name and path.is_file() else None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping, without ``_BASE_`` resolution; YAML tags are refused, never executed.

    Raises:
        InputError: unreadable, not YAML, a YAML tag, a repeated key, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.constructor.ConstructorError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise InputError(f"{path}{where}: {error.problem}; only plain YAML is accepted") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a YAML text file: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold KEY: VALUE pairs, not a {type(content).__name__}")
    return content


def read_with_bases(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the chain of files that a config stands on, the most basic first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    current: Path | None = Path(path)
    while current is not None:
        if any(current.resolve() == seen.resolve() for seen, _ in chain):
            raise InputError(f"{current} is its own {BASE_KEY}: remove the circle")
        content = read_yaml(current)
        base = content.pop(BASE_KEY, None)
        chain.append((current, content))
        if base is None:
            break
        following = current.parent / Path(str(base)).expanduser()
        if not following.is_file():
            raise InputError(f"{current}: {BASE_KEY} {str(base)!r} is not a file beside it")
        current = following
    return chain[::-1]


def load_config(
    schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = (), folder: str = ""
) -> T:
    """Return a frozen ``schema`` instance: defaults, then the YAML chain, then ``KEY VALUE`` pairs.

    Args:
        schema: a (frozen) dataclass whose fields are plain values, lists or further dataclasses.
        path: a YAML file as given or under ``configs/`` (or ``configs/folder``); None for defaults.
        overrides: alternating dotted keys and YAML values, ``["optim.lr", "0.1"]``.

    Raises:
        InputError: unknown key (names the nearest), wrong type, a number that is not finite, odd
            number of overrides.
    """
    config = _unlocked(OmegaConf.structured(schema))
    if path is not None:
        for file, content in read_with_bases(find_config(path, folder)):
            config = _merge(config, schema, content, str(file))
    if len(overrides) % 2:
        raise InputError(
            f"overrides come in KEY VALUE pairs, but {overrides[-1]!r} has no value; "
            "write for example: optim.lr 0.1"
        )
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError:
            value = text
        nested: dict[str, Any] = {}
        node = nested
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        config = _merge(config, schema, nested, f"override {key!r}")
    try:
        loaded = typing.cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(_first_line(error)) from None
    for key, value in _dotted_items(to_dict(loaded)):
        if any(isinstance(v, float) and not math.isfinite(v) for v in _listed(value)):
            raise InputError(f"{key} is {value}; only finite numbers are accepted")
    return loaded


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain nested dicts, lists, strings and numbers (fit for YAML and JSON)."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically; loading it again gives an equal config."""
    with atomic_file(path) as file:
        file.write(yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that a schema declares."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = prefix + field.name
        yield name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from schema_keys(typing.cast(type, hints[field.name]), name + ".")


class _StrictLoader(yaml.SafeLoader):
    """``yaml.safe_load`` that also refuses a repeated key and reads ``1e-4`` as a number."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_StrictLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-4 as a string, which no one means
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _unlocked(node: Any) -> Any:
    """Lift the read-only flags of frozen dataclasses while the config is being put together."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            _unlocked(node[key])
    return node


def _merge(config: Any, schema: type, content: dict[str, Any], where: str) -> Any:
    known = list(schema_keys(schema))
    for key, value in _dotted_items(content):
        siblings = [] if key in known else _siblings(schema, key)
        if siblings:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, [*siblings, *known])}")
        inner = next((name for name in known if name.startswith(f"{key}.")), None)
        if inner and not isinstance(value, dict):
            raise InputError(f"{where}: {key} is a group of keys, not {value!r}; set {inner}, …")
    try:
        return OmegaConf.merge(config, content)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "value"
        raise InputError(f"{where}: {key}: {_first_line(error)}") from None


def _dotted_items(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        yield name, value
        if isinstance(value, dict):
            yield from _dotted_items(value, name + ".")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _siblings(schema: type, key: str) -> list[str]:
    """Return the keys that stand where an unknown one does; none if any name may stand there.

    Any name may stand in a plain dict or list, and in ``Any``; a dict of dataclasses has free names
    with known keys below.
    """
    hint: Any = schema
    parts = key.split(".")
    for place, part in enumerate(parts):
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            hint = typing.get_args(hint)[1]
            continue
        if not dataclasses.is_dataclass(hint):
            free = hint is Any or typing.get_origin(hint) in (dict, list)
            return [] if free else [".".join(parts[:place])]
        hints = typing.get_type_hints(hint)
        if part not in hints:
            return [".".join([*parts[:place], name]) for name in hints]
        hint = hints[part]
    return []


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``; did you mean '…'?`` with the closest of dotted keys, or nothing."""
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5) or [
        by_last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=2)
    ]
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
