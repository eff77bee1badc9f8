"""Progress of long work: a bar with ETA on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_SECONDS = 10.0  # at most one line in this time, where the output is no terminal


class Progress:
    """Counts ``total`` units of work; the same calls draw a bar or write lines.

    Args:
        total: units in all.
        description: what is being done, at the head of the bar or line.
        done: units that an earlier run has finished (they do not count for the ETA).
        quiet: say nothing (ranks other than the first).
    """

    def __init__(self, total: int, description: str, done: int = 0, quiet: bool = False) -> None:
        self.total, self.description = total, description
        self.count, self._first = done, done
        self._started = self._last_line = time.monotonic()
        self.start_lap()
        self._quiet = quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=description, dynamic_ncols=True)

    def update(self, units: int = 1, **figures: float | str) -> None:
        """Count ``units`` more as done; ``figures`` stand beside the bar or in the line."""
        self.count += units
        if self._bar is not None:
            self._bar.update(units)
            if figures:
                self._bar.set_postfix_str(_format(figures), refresh=False)
        elif not self._quiet:
            now = time.monotonic()
            if now - self._last_line >= LOG_SECONDS or self.count == self.total:
                self._last_line = now
                print(self.line(figures), file=sys.stderr, flush=True)

    def line(self, figures: dict[str, float | str] | None = None) -> str:
        """Return the state as one plain line."""
        head = f"{self.description}: {self.count}/{self.total}"
        tail = f"  {_format(figures)}" if figures else ""
        return f"{head}  eta {format_seconds(self.eta())}{tail}"

    def rate(self) -> float:
        """Return units per second of this run; 0 at its start."""
        return (self.count - self._first) / max(time.monotonic() - self._started, 1e-9)

    def start_lap(self) -> None:
        """Let ``lap_rate`` count from here: what came before, such as an evaluation, is apart."""
        self._lap = (self.count, time.monotonic())

    def lap_rate(self) -> float:
        """Return units per second since the lap began, and begin the next."""
        count, began = self._lap
        self.start_lap()
        return (self.count - count) / max(self._lap[1] - began, 1e-9)

    def eta(self) -> float:
        """Return the expected seconds to the end, from this run's own speed."""
        done = self.count - self._first
        if done <= 0:
            return float("nan")
        return (self.total - self.count) / self.rate()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def format_seconds(seconds: float) -> str:
    """Return ``1:02:03``, ``2:03`` or ``--:--`` for NaN."""
    if seconds != seconds:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _format(figures: dict[str, float | str]) -> str:
    parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
    return "  ".join(parts)
