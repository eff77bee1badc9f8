"""Why a tool ends before its work is done; ``tools/_checkout.py`` maps each to an exit status."""

STOPPED_STATUS = 75  # exit status after a signal: everything is saved, start again with --resume


class InputError(ValueError):
    """Bad input, said in one sentence that names the file, key or value and what would be right.

    Every tool prints it as ``error: <sentence>`` and exits with status 2 (``tools/_checkout.py``).
    Raise it before anything is written, so that nothing is lost or left half-written.
    """


class UnreadableImage(InputError):
    """An image file is missing or does not decode; the sentence names it."""


class NonFiniteLoss(FloatingPointError):
    """A loss or a weight is NaN or infinite; nothing of that step was saved. Exit status 1."""


class LostRank(RuntimeError):
    """Another process of the group has died or hangs. Exit status 1; ``--resume`` goes on."""


class Stopped(BaseException):
    """A signal asked to stop; what was to be saved is saved. Exit status 75.

    Like ``KeyboardInterrupt`` it passes every ``except Exception``.
    """
