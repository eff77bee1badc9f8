"""Who may import whom: the folders hand over files and hardly know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "core", "data", "models", "training", "pretrain", "convert", "detection", "transfer",
    "analysis", "report", "suite",
)  # fmt: skip
# core <- data <- models <- training <- {pretrain, transfer} and convert <- detection
FLOORS = {"core", "data", "models", "training"}
ALLOWED = {
    "core": {"core"},
    "data": {"core", "data"},
    "models": {"core", "data", "models"},
    "training": FLOORS,
    "pretrain": FLOORS | {"pretrain"},
    "convert": {"core", "models", "convert"},
    "detection": FLOORS | {"convert", "detection", "detectron2"},
    "transfer": FLOORS | {"transfer"},
    "analysis": FLOORS | {"analysis", "transfer.linear"},
    "report": {"core.results", "core.identity", "core.config", "report"},
    "suite": {"core", "report", "suite"},
}
PURE = (
    "pretrain.losses", "convert.names", "convert.sources", "analysis.retrieval",
    "analysis.clustering", "analysis.mutual_information",
)  # fmt: skip
TORCH_FREE = (
    "core.results", "core.identity", "core.config", "core.errors", "core.files", "report", "suite",
)  # fmt: skip
OURS = {*PACKAGES, "tools", "tests", "benchmarks"}


def _modules() -> list[str]:
    files = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]


def _imports(module: str) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; name the package"
            base = node.module or ""
            if base.split(".")[0] in OURS:
                paths = {
                    alias.name: ROOT / Path(*base.split("."), alias.name) for alias in node.names
                }
                found |= {
                    f"{base}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else base
                    for name, path in paths.items()
                }
            else:
                found.add(base)
    return found


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


@pytest.mark.parametrize("module", _modules())
def test_a_module_imports_only_what_its_folder_may(module: str) -> None:
    watched = OURS | {"detectron2"}
    imported = {name for name in _imports(module) if name.split(".")[0] in watched}
    allowed = ALLOWED[module.split(".")[0]]
    assert {name for name in imported if not _within(name, allowed)} == set()


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_of_ours(module: str) -> None:
    assert {name for name in _imports(module) if name.split(".")[0] in OURS} == set()


@pytest.mark.parametrize("module", [m for m in _modules() if _within(m, set(TORCH_FREE))])
def test_what_a_laptop_rebuilds_tables_with_needs_no_torch(module: str) -> None:
    """Follows imports through our own modules."""
    seen, open_modules = set(), [module]
    while open_modules:
        name = open_modules.pop()
        if name in seen or not (ROOT / Path(*name.split("."))).with_suffix(".py").exists():
            continue
        seen.add(name)
        for imported in _imports(name):
            assert imported.split(".")[0] not in {"torch", "torchvision", "detectron2"}, name
            if imported.split(".")[0] in OURS:
                open_modules.append(imported)


def test_the_reader_of_imports_sees_a_forbidden_one(tmp_path: Path) -> None:
    """The check itself: detectron2 is found where it is imported."""
    assert any(name.split(".")[0] == "detectron2" for m in _modules() for name in _imports(m))
    assert not _within("transfer.finetune", ALLOWED["analysis"])
    assert not _within("training.loop", ALLOWED["report"])
