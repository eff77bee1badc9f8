"""The one exception that means: the user's input is wrong, and here is what would be right."""


class InputError(ValueError):
    """Bad input, said in one sentence that names the file, key or value and what would be right.

    Every tool prints it as ``error: <sentence>`` and exits with status 2 (``tools/_checkout.py``).
    Raise it before anything is written, so that nothing is lost or left half-written.
    """
