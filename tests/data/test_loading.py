"""Decoding in workers: a Ctrl-C is never lost."""

from __future__ import annotations

from pathlib import Path

from forked import FORKS

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


def test_a_ctrl_c_while_workers_start_is_not_lost(tmp_path: Path) -> None:
    for hook in ("before", "after_in_parent"):
        script = STARTED_AND_INTERRUPTED.format(hook=hook)
        run = FORKS.run(["-c", script], cwd=tmp_path)
        assert (run.stdout, run.returncode) == ("interrupted 1\n", 0), run.stderr
        assert "KeyboardInterrupt" not in run.stderr
