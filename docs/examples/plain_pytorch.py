"""A plain PyTorch loop: DataLoader workers that live on between epochs, and a checkpoint in the middle of one.

python plain_pytorch.py SELECTION ITEMS
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache import SelectedBatchSampler


def main(selection: str, items: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(items, 8, generator=generator), torch.arange(items) % 3)
    model = torch.nn.Linear(8, 3)
    sampler = SelectedBatchSampler(selection, dataset=dataset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=sampler.total_steps)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
    )
    step, checkpoint = 0, None
    for epoch in range(sampler.epochs):
        for features, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == sampler.total_steps // 2:
                # Workers have read ahead: the sampler is told how many steps were trained.
                checkpoint = sampler.state_dict(step=step)
        print(f"epoch {epoch}: {len(loader)} steps, loss {loss.item():.3f}")
    again = SelectedBatchSampler(selection, dataset=dataset)
    again.load_state_dict(checkpoint)
    rest = sum(1 for _ in range(again.epoch, again.epochs) for _ in again)
    print(f"steps: {step} of {sampler.total_steps}; a resume from step {checkpoint['step']} has {rest} left")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
