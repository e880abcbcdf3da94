"""Hugging Face's run_image_classification.py in short: a folder of images, transforms, a model, its own Trainer.

The lines that a selection adds end with "# selection". It was made from the same data set without transforms:
gstds_cache.embed(ImageFolder(FOLDER), cache=STORE).

python hf_image_classification.py FOLDER SELECTION OUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from gstds_cache import SelectedBatchSampler  # selection


class SeekEpoch(TrainerCallback):  # selection
    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **others: Any) -> None:  # selection
        others["train_dataloader"].batch_sampler.seek(int(state.epoch or 0))  # selection


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main(folder: str, selection: str, out: str) -> None:
    transforms = v2.Compose(
        [v2.PILToTensor(), v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    dataset = ImageFolder(folder, transforms)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=len(dataset.classes)
    )
    sampler = SelectedBatchSampler(selection, dataset=dataset)  # selection
    arguments = TrainingArguments(
        out,
        num_train_epochs=sampler.epochs,  # selection
        learning_rate=1e-3,
        logging_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        ResNetForImageClassification(config),
        arguments,
        data_collator=collate,
        train_dataset=dataset,
        callbacks=[SeekEpoch()],  # selection
    )
    trainer.get_train_dataloader = lambda: DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)  # selection
    result = trainer.train()
    print(f"steps: {result.global_step} of {sampler.total_steps}; loss {result.training_loss:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
