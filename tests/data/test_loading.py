"""Decoding in workers: a Ctrl-C is never lost, and nobody tells of a run that has gone."""

from __future__ import annotations

import subprocess
import sys

STARTED_AND_INTERRUPTED = """
import os, signal
import torch
from PIL import Image
from gstds_cache.data.loading import pixel_batches

class Source:
    def image(self, row):
        return Image.new("RGB", (2, 2))

interrupts = []
def as_the_terminal_does():
    # In here Python prints an exception, and forgets it.
    if not interrupts:
        interrupts.append(1)
        os.kill(os.getpid(), signal.SIGINT)

os.register_at_fork({hook}=as_the_terminal_does)
try:
    batches = pixel_batches(Source(), lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8), (3, 2, 2),
                            [[0], [1]], workers=1, pin=False)
    print("not interrupted", [batch.rows for batch in batches])
except KeyboardInterrupt:
    print("interrupted", len(interrupts))
"""

A_WORKER_LEFT_ALONE = """
import sys, threading
from gstds_cache.data.loading import quiet_worker

quiet_worker(0)
for error in (EOFError(), ConnectionResetError("gone"), BrokenPipeError("gone"), RuntimeError("worth telling")):
    try:
        raise error
    except Exception:
        sys.excepthook(*sys.exc_info())  # as multiprocessing.resource_sharer does
"""


def test_a_ctrl_c_while_workers_start_is_not_lost() -> None:
    for hook in ("before", "after_in_parent"):
        script = STARTED_AND_INTERRUPTED.format(hook=hook)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert (run.stdout, run.returncode) == ("interrupted 1\n", 0), run.stderr
        assert "KeyboardInterrupt" not in run.stderr


def test_a_worker_whose_run_has_gone_goes_without_a_word() -> None:
    run = subprocess.run(
        [sys.executable, "-c", A_WORKER_LEFT_ALONE], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0
    assert "worth telling" in run.stderr
    assert "EOFError" not in run.stderr
    assert "gone" not in run.stderr
