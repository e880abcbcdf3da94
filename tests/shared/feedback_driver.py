"""What one rank does under torchrun: trains on candidates through the sampler, then is ``gstds-train``.

``torchrun ... feedback_driver.py FOLDER SELECTION words of gstds-train ...``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gstds_cache.cli.train_command import main

from gstds_cache.errors import UsageError
from gstds_cache.training.distributed import process_group
from gstds_cache.training.sampler import SelectedBatchSampler

STOP = 6  # in the middle of an epoch


def loss_of(rows: list[int], step: int) -> torch.Tensor:
    return torch.tensor([1 + (row * 7919 % 101) / 20 - step / 50 for row in rows])


def train(selection: str, mode: str, state: Path, *, first: bool) -> list[list[int]]:
    """Rows by step. ``stop`` ends early, and the first rank saves; in the other modes the second reports too little."""
    sampler, batches = SelectedBatchSampler(selection, tail="pad"), []
    for _ in range(sampler.epochs):
        for rows in sampler:
            step = len(batches)
            if mode == "stop" or first or (mode == "last one missing" and step % 4 < 3):
                sampler.report(loss_of(rows, step))
            batches.append(rows)
            if mode == "stop" and sampler.step == STOP:
                sampler.share_losses()
                if first:
                    state.write_text(json.dumps(sampler.state_dict(step=STOP)))
                return batches
    return batches


if __name__ == "__main__":
    folder, selection = Path(sys.argv[1]), sys.argv[2]
    with process_group("cpu") as joined:
        done: dict[str, object] = {}
        for mode in ("stop", "last one missing", "none at all"):
            try:
                done[mode] = train(selection, mode, folder / "state.json", first=joined.first)
            except UsageError as error:
                done[mode] = str(error)
        (folder / f"{joined.rank}.json").write_text(json.dumps(done))
        main(sys.argv[3:])
