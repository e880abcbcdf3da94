"""A plain PyTorch loop on candidates: it reports the losses it computes anyway, and goes on after a kill.

python report_losses.py SELECTION ITEMS CHECKPOINT [KILL_AFTER]

With KILL_AFTER it kills itself after that step, as a machine that fails does. The same command without it goes on from
CHECKPOINT, and ends with the weights of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache import SelectedBatchSampler

EVERY = 3  # steps between checkpoints


def main(selection: str, items: int, checkpoint: Path, kill_after: int | None = None) -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(items, 8, generator=generator), torch.arange(items) % 3)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = SelectedBatchSampler(selection, dataset=dataset, importance_weights=True)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        step = state["step"]
        print(f"goes on after step {step} of {sampler.total_steps}, in the middle of epoch {sampler.epoch}")
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    while step < sampler.total_steps:
        for features, labels in loader:
            losses = cross_entropy(model(features), labels, reduction="none")
            optimizer.zero_grad()
            (losses * sampler.weights()).mean().backward()
            optimizer.step()
            step += 1
            sampler.report(losses, step=step)
            if step % EVERY == 0:
                # Workers have read ahead: the sampler is told how many steps were trained.
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state | {"sampler": sampler.state_dict(step=step)}, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
            if step == kill_after:
                print(f"killed after step {step}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    print(f"steps: {step}; weights {hashlib.sha256(weights).hexdigest()[:16]}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
