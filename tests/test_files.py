"""Locked folders, and folders that cannot be."""

import errno
import importlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import InputError
from core.files import LOCK, check_folder, check_not_locked, is_empty, locked
from tests.test_signals import ROOT, script, wait_until


def is_free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except InputError:
        return False


def test_a_held_folder_is_refused_and_names_its_holder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a" / "run"),
        pytest.raises(InputError, match=rf"a/run is in use by another run, .* {os.getpid()} on "),
        locked(tmp_path / "a" / "run"),
    ):
        pass
    check_not_locked(tmp_path / "a" / "run")
    with locked(tmp_path / "a" / "run"), pytest.raises(InputError, match="is in use by another"):
        check_not_locked(tmp_path / "a" / "run")
    with locked(tmp_path / "a" / "run"), locked(tmp_path / "a" / "run", name=".other"):
        pass


def test_a_lock_goes_with_its_process_although_a_forked_child_lives_on(tmp_path: Path) -> None:
    """A loading process that outlives a killed run for a moment does not hold the folder."""
    command = script(
        tmp_path / "hold.py",
        f"""
        import multiprocessing, pathlib, time
        from core.files import locked
        with locked(pathlib.Path({str(tmp_path)!r})):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
            child.start()
            print(child.pid, flush=True)
            time.sleep(60)
        """,
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(InputError, match=f"process {process.pid}"), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        wait_until(lambda: is_free(tmp_path))
        os.kill(child, signal.SIGKILL)  # it was alive


def test_a_command_that_inherits_the_lock_holds_the_folder_on(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    with pytest.raises(InputError), locked(tmp_path):
        pass
    child.kill()
    child.wait()
    wait_until(lambda: is_free(tmp_path))


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=rf"{tmp_path}/file is a file; name a folder"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "run")
    assert is_empty(tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / LOCK).touch()
    (tmp_path / "new" / ".half.tmp").touch()
    assert is_empty(tmp_path / "new")
    (tmp_path / "new" / "log").touch()
    assert not is_empty(tmp_path / "new")


@pytest.mark.parametrize(
    "words",
    [
        ["benchmark.py", "--output"], ["compare.py", "--output"], ["evaluate.py", "--output"],
        ["make_report.py", "--output"], ["make_shards.py"], ["run_analysis.py", "--figures"],
        ["preflight.py", "--output"], ["run_pretrain.py", "ctc", "--output"],
        ["run_transfer.py", "--output"], ["train_net.py", "--output"], ["unpack_data.py", "a.zip"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_output_that_names_a_file_is_one_sentence(
    tmp_path: Path, call_tool: Callable[..., tuple[int, str, str]], words: list[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        status, _, said = call_tool(*words, output)
        assert (status, said.count("\n")) == (2, 1), said
        assert f"{tmp_path}/file is a file; name a folder" in said
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_to_write_that_names_a_folder_is_one_sentence(
    tmp_path: Path, call_tool: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "x.pth"):
        status, _, said = call_tool("convert_to_d2.py", "--output", output)
        assert (status, said.count("\n")) == (2, 1), said


def test_a_folder_that_may_not_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    checkout = importlib.import_module("_checkout")

    def main() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/run")

    with pytest.raises(SystemExit) as ended:
        checkout.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: /data/run: Permission denied\n"
