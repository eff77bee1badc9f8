"""Puts the checkout's root first on ``sys.path``; bad input becomes one line and status 2."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"

sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("omegaconf") is None:  # another Python: use the checkout's own
    if not VENV_PYTHON.exists() or Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        sys.exit("error: the suite is not set up; run `make .venv` in " + str(ROOT))
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the lines of its description; its errors are ``InputError``."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        from core.errors import InputError

        raise InputError(f"{message} (see --help)")


def folder(text: str) -> Path:
    """As ``type`` of an argument: a folder that is there or can be made."""
    from core.errors import InputError
    from core.files import check_folder

    try:
        check_folder(Path(text).expanduser())
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text).expanduser()


def file(text: str) -> Path:
    """As ``type`` of an argument: a file that is there or can be made."""
    path = Path(text).expanduser()
    folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    return path


def run(main: Callable[[], int | None]) -> None:
    """Call ``main``; what ends it early becomes one line on stderr and its exit status."""
    from core import errors, launch, signals

    launch.end_with_launcher()
    with signals.raising_stopped():
        try:
            status = _status_of(main)
        except errors.Stopped:  # while another end was reported
            status = errors.STOPPED_STATUS
    sys.stdout.flush()
    sys.exit(status)


def _status_of(main: Callable[[], int | None]) -> int | None:
    from core import errors
    from core.files import is_full

    try:
        return main()
    except errors.InputError as error:
        sentence = str(error).rsplit("InputError: ", 1)[-1].strip()  # behind a worker's traceback
        _say(f"error: {sentence}", isinstance(error, errors.UnreadableImage))
        return 2
    except errors.NonFiniteLoss as error:
        _say(f"error: {error}")
        return 1
    except errors.LostRank as error:
        _say(f"error: {error}; start again with --resume", True)
        return 1
    except errors.Stopped as stopped:
        _say(str(stopped))
        return errors.STOPPED_STATUS
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if is_full(error):
            name = error.filename or "a file"
            _say(f"error: no space left to write {name}; what was saved is whole")
        elif isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            _say(f"error: {error.filename}: {error.strerror}")
        else:
            raise
        return 2


def _say(line: str, rank_alone: bool = False) -> None:
    """Print to stderr, once for all ranks."""
    from core import launch

    if launch.speaks(rank_alone):
        print(line, file=sys.stderr, flush=True)
