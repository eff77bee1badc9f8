"""Configs: differences over a base, one override grammar, and errors that name what is right."""

import dataclasses
from pathlib import Path

import pytest

from core.config import CONFIG_DIR, InputError, find_config, load_config, save_config, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    steps: int = 3
    names: list[str] = dataclasses.field(default_factory=list)
    free: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outer:
    optim: Inner = dataclasses.field(default_factory=Inner)
    flag: bool = False
    note: str = ""


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_later_wins_default_then_base_then_file_then_override(tmp_path: Path) -> None:
    _write(tmp_path, "base.yaml", "optim: {lr: 1, steps: 5}\nnote: base\n")
    path = _write(tmp_path, "top.yaml", "_BASE_: base.yaml\noptim: {lr: 2e-3}\n")
    config = load_config(Outer, path, ["optim.names", "[a, b]", "flag", "true"])
    assert config == Outer(Inner(0.002, 5, ["a", "b"]), True, "base")


def test_a_config_cannot_be_changed_after_loading() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(Outer).optim.lr = 1.0  # type: ignore[misc]


def test_a_saved_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = load_config(Outer, None, ["optim.lr", "1e-7", "note", "'1'", "optim.free", "{a: 1}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Outer, tmp_path / "saved.yaml") == config
    assert to_dict(config)["note"] == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("lr: 1", "did you mean 'optim.lr'"),
        ("optim: {lr: fast}", "optim.lr.*'fast'"),
        ("optim: {steps: 1.5}", "optim.steps.*1.5"),
        ("optim: 3", "optim is a group of keys, not 3; set optim.lr"),
        ("optim: {lr: 1, lr: 2}", "'lr' stands twice"),
        ("- 1", "must hold KEY: VALUE pairs"),
        ("optim: {", "not valid YAML"),
        ("_BASE_: nothing.yaml", "nothing.yaml"),
        ("_BASE_: bad.yaml", "its own _BASE_"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, text: str, message: str
) -> None:
    path = _write(tmp_path, "bad.yaml", text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(Outer, path)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_yaml_tag_is_refused_and_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    path = f"!!python/object/apply:pathlib.Path ['{sentinel}']"
    text = f"note: !!python/object/apply:pathlib.Path.touch [{path}]"
    for name in ("top.yaml", "base.yaml"):
        _write(tmp_path, name, text)
        child = _write(tmp_path, "child.yaml", f"_BASE_: {name}\n")
        with pytest.raises(InputError, match="only plain YAML"):
            load_config(Outer, child)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr"], "'optim.lr' has no value"),
        (["optim.lx", "1"], "did you mean 'optim.lr'"),
        (["optim.lr", "x"], "optim.lr"),
    ],
)
def test_a_wrong_override_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(Outer, None, overrides)


def test_a_config_is_found_as_given_or_under_configs(tmp_path: Path) -> None:
    own = _write(tmp_path, "own.yaml", "")
    assert find_config(own) == own
    some = next(iter(sorted(CONFIG_DIR.rglob("*.yaml"))))
    assert find_config(some.relative_to(CONFIG_DIR)) == some
    with pytest.raises(InputError, match="did you mean") as caught:
        find_config(str(some.relative_to(CONFIG_DIR)).replace(".yaml", "x.yaml"))
    assert str(some.relative_to(CONFIG_DIR)) in str(caught.value)
