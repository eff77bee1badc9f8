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


def run(main: Callable[[], int | None]) -> None:
    """Call ``main``; what ends it early becomes one line on stderr and its exit status."""
    from core.errors import STOPPED_STATUS, InputError, LostRank, NonFiniteLoss, Stopped
    from core.files import is_full

    try:
        status = main()
    except InputError as error:
        _say(f"error: {error}")
        status = 2
    except NonFiniteLoss as error:
        _say(f"error: {error}; lower the learning rate, or train without amp")
        status = 1
    except LostRank as error:
        print(f"error: {error}; start again with --resume", file=sys.stderr)  # of any rank
        status = 1
    except Stopped as stopped:
        _say(f"{stopped}; go on with --resume")
        status = STOPPED_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 141
    except OSError as error:
        if not is_full(error):
            raise
        _say(f"error: no space left to write {error.filename or 'a file'}; what was saved is whole")
        status = 2
    sys.stdout.flush()
    sys.exit(status)


def _say(line: str) -> None:
    """Print to stderr, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
