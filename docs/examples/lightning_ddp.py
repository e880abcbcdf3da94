"""PyTorch Lightning under DDP. It replaces samplers unless told not to: use_distributed_sampler=False.

torchrun --nproc-per-node 2 lightning_ddp.py SELECTION ITEMS
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache import GstdsError, SelectedBatchSampler


class Model(lightning.LightningModule):
    def __init__(self, selection: str, items: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 3)
        self.selection, self.items = selection, items
        self.seen: list[list[int]] = []

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.items, 8, generator=generator)
        dataset = TensorDataset(features, torch.arange(self.items) % 3, torch.arange(self.items))
        # Here the process group is there, so rank and world size are right.
        return DataLoader(dataset, batch_sampler=SelectedBatchSampler(self.selection, dataset=dataset, tail="pad"))

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        features, labels, rows = batch
        self.seen.append(rows.tolist())
        return torch.nn.functional.cross_entropy(self.net(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(epochs: int, *, inject: bool) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), strategy="ddp",
        max_epochs=epochs, use_distributed_sampler=inject,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main(selection: str, items: int) -> None:
    epochs = SelectedBatchSampler(selection).epochs
    try:
        trainer(epochs, inject=True).fit(Model(selection, items))
    except (GstdsError, TypeError) as error:
        print(f"with Lightning's own sampler: refused: {str(error).splitlines()[0].strip()}", flush=True)
    model = Model(selection, items)
    trainer(epochs, inject=False).fit(model)
    print(f"rank {model.global_rank}: {len(model.seen)} steps, rows {model.seen}", flush=True)
    # The wrapped network holds the process group: let it go first, or the process may abort at its exit.
    del model
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
