"""Puts the checkout's root first on ``sys.path``; bad input becomes one line and status 2."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"

sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("omegaconf") is None:  # another Python: use the checkout's own
    if not VENV_PYTHON.exists() or Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        sys.exit("error: the suite is not set up; run `make .venv` in " + str(ROOT))
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])


def run(main: Callable[[], int | None]) -> None:
    """Call ``main``; an ``InputError`` becomes ``error: …`` on stderr and exit status 2."""
    from core.errors import InputError

    try:
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 141
    sys.stdout.flush()
    sys.exit(status)
