"""Ctrl-C during training: the first asks the loop to stop after its step, the second interrupts at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gstds_cache.runtime.notify import Notify


@contextmanager
def stop_after_step(notify: Notify) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request that the loop asks for.

    Signals are the main thread's: in another thread nothing is changed. The handler that was there is put back.

    Args:
        notify: Told that the request was heard.

    Yields:
        A function that says whether to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def on_interrupt(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if sys.stderr.isatty():
            print(file=sys.stderr)  # end the line that a progress bar rewrites
        notify("stopping after this step (Ctrl-C again: at once)")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
