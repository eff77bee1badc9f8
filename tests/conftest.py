"""What several tests need: small real data where it is at hand, and processes that form a group."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tool_process

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)  # networks here are so small that threads wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data (COCO, CIFAR, flowers); skips where there is none."""
    folder = Path(os.environ.get("TRANSFER_SUITE_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no small real data: {folder} does not exist (set TRANSFER_SUITE_DATA)")
    return folder


@pytest.fixture
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``tools/NAME args…`` as a user would, from another folder; returns output and status."""

    def run(
        name: str, *arguments: object, cwd: Path | None = None, ranks: int = 1, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        words = [str(ROOT / "tools" / name), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        if ranks == 1:
            return tool_process.call(words, cwd or Path("/"), environment, timeout)
        launcher = [sys.executable, str(ROOT / "tools" / "launch.py"), "--processes", str(ranks)]
        return subprocess.run(
            [*launcher, *words],
            cwd=cwd or "/",
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )

    return run


@pytest.fixture
def call_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run ``tools/NAME args…`` in this process, from an empty folder: (status, stdout, stderr)."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., None]:
    """Run a Python script as a group of gloo processes; a failing rank fails the test."""

    def run(
        script: str, ranks: int, *arguments: object, timeout: float = 200, torchrun: bool = False
    ) -> None:
        path = tmp_path / f"ranks_{ranks}.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
        command = [sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks)]
        elif ranks > 1:
            command += [str(ROOT / "tools/launch.py"), "--processes", str(ranks)]
        result = subprocess.run(
            [*command, str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 48 + 24 images of 16×16 in three learnable classes, one colour each."""
    generator = np.random.default_rng(7)
    content = {"classes": np.array(["red", "green", "blue"])}
    for split, count in (("train", 48), ("test", 24)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 160, (count, 16, 16, 3))
        images[np.arange(count), :, :, labels] += 60
        content[f"x_{split}"] = images.astype(np.uint8)
        content[f"y_{split}"] = labels.astype(np.int64)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **content)
    return path
