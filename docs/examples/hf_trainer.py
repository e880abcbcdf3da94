"""Hugging Face Trainer: its own loader is replaced, and a resumed run is told which epoch it is in.

python hf_trainer.py SELECTION ITEMS OUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gstds_cache import SelectedBatchSampler


class Items(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, items: int) -> None:
        self.features = torch.randn(items, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[row], "labels": torch.tensor(row % 3), "rows": torch.tensor(row)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 3)
        self.seen: list[list[int]] = []

    def forward(self, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(rows.tolist())
        logits = self.net(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class SelectedTrainer(Trainer):
    """A Trainer whose training batches are a selection's.

    The loader is not passed to ``accelerator.prepare``: the sampler slices for the ranks itself.
    """

    def __init__(self, sampler: SelectedBatchSampler, **options: Any) -> None:
        super().__init__(**options)
        self.sampler = sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)


class SeekEpoch(TrainerCallback):
    """On a resume the Trainer skips the batches of the epoch it is in, but not the epochs before it."""

    def __init__(self, sampler: SelectedBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.sampler.seek(int(state.epoch or 0))


def run(selection: str, items: int, out: str, *, resume: bool = False) -> list[list[int]]:
    sampler, model = SelectedBatchSampler(selection), Model()
    arguments = TrainingArguments(
        out, num_train_epochs=sampler.epochs, save_steps=5, logging_strategy="no", report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SelectedTrainer(
        sampler, model=model, args=arguments, train_dataset=Items(items), callbacks=[SeekEpoch(sampler)]
    )
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-5" if resume else None)
    return model.seen


def main(selection: str, items: int, out: str) -> None:
    sampler = SelectedBatchSampler(selection)
    expected = [rows for _ in range(sampler.epochs) for rows in sampler]
    print(f"the selection's batches: {run(selection, items, out) == expected}")
    print(f"resumed after step 5, the rest of them: {run(selection, items, out, resume=True) == expected[5:]}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
