"""Stop signals: remembered or raised, kept from loading processes, also when a terminal closes."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from core import signals
from core.errors import Stopped
from data.loaders import Loader, start

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_request_is_remembered_and_acts_at_the_end_if_nobody_has_heeded_it(
    number: signal.Signals,
) -> None:
    outside: list[int] = []
    before = signal.signal(number, lambda n, _: outside.append(n))
    try:
        with signals.StopRequests() as stop:
            assert stop.requested is None
            signal.raise_signal(number)
            assert stop.requested is number
            assert outside == []
        assert outside == [number]
        with pytest.raises(Stopped), signals.StopRequests() as stop:
            signal.raise_signal(number)
            raise Stopped  # heeded
        assert outside == [number]
    finally:
        signal.signal(number, before)


def test_the_first_signal_raises_and_repeats_are_ignored() -> None:
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        with signals.raising_stopped():
            with pytest.raises(Stopped, match="stopped by SIGUSR1"):
                signal.raise_signal(signal.SIGUSR1)
            for number in signals.SIGNALS:
                signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # a scheduler's last one, while the process ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with signals.raising_stopped():
        pass
    assert {number: signal.getsignal(number) for number in signals.SIGNALS} == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raising_stopped(), signals.StopRequests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


class Pids(Dataset[int]):
    """Each item is the process that loads it."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: int) -> int:
        return os.getpid()


def wait_until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_workers_survive_stop_signals_and_end_with_the_loader() -> None:
    loader = Loader(Pids(), 2, batch_size=4)
    pids: set[int] = set()
    for number, batch in enumerate(start(loader.batches)):
        pids |= set(batch.tolist())
        if number == 2:
            for pid in pids:
                for signal_number in signals.SIGNALS:
                    os.kill(pid, signal_number)
    assert len(pids) == 2  # all batches came from the same two
    assert os.getpid() not in pids
    del loader
    wait_until(lambda: all(map(is_gone, pids)))


def script(path: Path, text: str) -> list[str]:
    """Write a Python script that finds this checkout; return its command."""
    head = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]\n"
    path.write_text(head + textwrap.dedent(text))
    return [sys.executable, str(path)]


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = script(
        tmp_path / "load.py",
        """
        import os, signal
        from tests.test_signals import Pids
        from data.loaders import Loader, start
        pids = set()
        for batch in start(Loader(Pids(), 2, batch_size=4).batches):
            pids |= set(batch.tolist())
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120).stdout
    wait_until(lambda: all(is_gone(int(pid)) for pid in said.split()), 4)  # torch looks after 5 s


def test_a_closed_terminal_does_not_keep_a_tool_from_saving(tmp_path: Path) -> None:
    """Its output goes nowhere from then on: writing to the terminal would raise."""
    command = script(
        tmp_path / "tool.py",
        f"""
        import pathlib, time
        import _checkout
        from core.errors import Stopped
        from core.signals import StopRequests

        def main():
            with StopRequests() as stop:
                print("at work", flush=True)
                while not stop.requested:
                    time.sleep(0.02)
                print("saving", flush=True)
                pathlib.Path({str(tmp_path / "saved")!r}).touch()
                raise Stopped("all is saved")

        _checkout.run(main)
        """,
    )
    outer, inner = pty.openpty()
    process = subprocess.Popen(command, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    assert b"at work" in os.read(outer, 100)
    os.close(outer)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    assert (tmp_path / "saved").exists()
