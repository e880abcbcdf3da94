"""Hugging Face Accelerate: it slices the batches, so the sampler must not; constant batches, split_batches=True.

torchrun --nproc-per-node 2 accelerate_split.py SELECTION ITEMS
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache import GstdsError, SelectedBatchSampler


def main(selection: str, items: int) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(items, 8, generator=generator)
    dataset = TensorDataset(features, torch.arange(items) % 3, torch.arange(items))
    if accelerator.num_processes > 1:
        try:
            accelerator.prepare(DataLoader(dataset, batch_sampler=SelectedBatchSampler(selection, batch_size=8)))
        except GstdsError as error:
            print(f"sliced by the sampler as well: refused: {str(error).splitlines()[0]}", flush=True)
    # The global batch is 8 rows, whatever the number of processes; Accelerate gives each its share.
    sampler = SelectedBatchSampler(selection, batch_size=8, rank=0, world_size=1, dataset=dataset)
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_sampler=sampler))
    seen = []
    for _ in range(sampler.epochs):
        for inputs, labels, rows in loader:
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            seen.append(rows.tolist())
    print(f"rank {accelerator.process_index}: {len(seen)} steps, rows {seen}", flush=True)
    # The wrapped network holds the process group: let it go first, or the process may abort at its exit.
    accelerator.free_memory()
    del model, optimizer, loader
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
