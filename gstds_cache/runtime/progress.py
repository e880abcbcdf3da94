"""Progress of long work: a callback, by default a line on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the phase, how much is done, of how much, and shares of the time by what it was spent on."""
Counted = Callable[[int, int], None]
"""Called with how much is done, of how much: what one phase of work reports."""


class ProgressBar:
    """Progress on stderr: one line that is rewritten on a terminal, plain lines every 10 seconds elsewhere."""

    def __init__(self, counted: str, **counted_in_phase: str) -> None:
        """Name what is counted.

        Args:
            counted: What is counted, e.g. ``images``.
            counted_in_phase: What is counted in a phase that counts something else, by phase.
        """
        self.counted, self.counted_in_phase = counted, counted_in_phase
        self._tty = sys.stderr.isatty()
        self._phase, self._begun, self._first, self._shown, self._drawn = "", 0.0, 0, 0.0, False

    def __call__(self, phase: str, done: int, total: int, shares: Mapping[str, float]) -> None:
        """Show ``done`` of ``total``."""
        now = time.monotonic()
        if phase != self._phase:
            self.end()
            self._phase, self._begun, self._first, self._shown = phase, now, done, now
        if now - self._shown < (0.2 if self._tty else 10):
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        counted = self.counted_in_phase.get(phase, self.counted)
        text = (
            f"{phase}: {done:,} of {total:,} {counted} ({done / max(total, 1):.0%}), {rate:,.1f}/s, "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}" + (f", {shares_text(shares)}" if shares else "")
        )
        print(f"\r{text}\x1b[K" if self._tty else text, file=sys.stderr, end="" if self._tty else "\n", flush=True)
        self._drawn = self._tty

    def end(self) -> None:
        """Finish a line that is being rewritten."""
        if self._drawn:
            print(file=sys.stderr)
        self._drawn = False


def shares_text(shares: Mapping[str, float]) -> str:
    """Shares of the time by name, on one line."""
    return ", ".join(
        f"{name} {share:.1%}" if 0 < share < 0.01 else f"{name} {share:.0%}" for name, share in shares.items()
    )


@contextmanager
def showing(progress: Progress | bool | None, counted: str, **counted_in_phase: str) -> Iterator[Progress]:
    """What to call with progress, while the block lasts.

    Args:
        progress: A callback as it is; True for a :class:`ProgressBar`; False or None for nothing.
        counted: For the bar: what is counted, e.g. ``images``.
        counted_in_phase: For the bar: what is counted in a phase that counts something else.

    Yields:
        The callback.
    """
    if callable(progress):
        yield progress
    elif progress:
        bar = ProgressBar(counted, **counted_in_phase)
        try:
            yield bar
        finally:
            bar.end()
    else:
        yield lambda _phase, _done, _total, _shares: None
