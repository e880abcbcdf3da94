"""A data set that lives on the device: the sampler's rows index it there, without DataLoader and workers.

python device_dataset.py SELECTION ITEMS
"""

from __future__ import annotations

import sys

import torch

from gstds_cache import SelectedBatchSampler


def main(selection: str, items: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    # Decoded once, then held on the device: 50,000 images of 32 x 32 take 154 MB as uint8.
    images = torch.randint(0, 256, (items, 3, 8, 8), dtype=torch.uint8, generator=generator).to(device)
    labels = (torch.arange(items) % 3).to(device)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True if device.type == "cuda" else None)
    sampler = SelectedBatchSampler(selection, dataset=images)
    steps, seen = 0, torch.zeros(items, dtype=torch.int64, device=device)
    for epoch in range(sampler.epochs):
        losses = []
        for rows in sampler:
            index = torch.tensor(rows)
            if device.type == "cuda":  # page-locked, so that the host does not wait for the copy
                index = index.pin_memory().to(device, non_blocking=True)
            batch = images[index].float().sub(127.5).div(63.75)
            mirrored = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5
            batch = torch.where(mirrored, batch.flip(3), batch)
            loss = torch.nn.functional.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # no loss.item(): that would wait for the device in every step
            seen[index] += 1
            steps += 1
        print(f"epoch {epoch}: {len(losses)} steps, loss {torch.stack(losses).mean().item():.3f}")
    print(f"steps: {steps} of {sampler.total_steps}; gradients: {int(seen.sum())} of {sampler.header.total_kept}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
