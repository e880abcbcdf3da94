"""timm's training script in short: its data set, loader, optimiser, schedule and loop, on a selection.

The lines that a selection adds end with "# selection". It was made from the same data set without transforms:
gstds_cache.embed(create_dataset("", root=FOLDER, split="train"), cache=STORE).

python timm_train.py FOLDER SELECTION
"""

from __future__ import annotations

import sys

import torch
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader

from gstds_cache import SelectedBatchSampler  # selection


def main(folder: str, selection: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    dataset_train = create_dataset("", root=folder, split="train", is_training=True)
    model = create_model("test_resnet", num_classes=len(dataset_train.reader.class_to_idx), in_chans=3).to(device)
    loader_train = create_loader(
        dataset_train, input_size=(3, 32, 32), batch_size=32, is_training=True, num_workers=1, device=device
    )
    sampler = SelectedBatchSampler(selection, dataset=dataset_train)  # selection
    plain = loader_train.loader  # selection
    new = DataLoader(dataset_train, batch_sampler=sampler, collate_fn=plain.collate_fn, num_workers=1)  # selection
    loader_train.loader = new  # selection
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=sampler.epochs,  # selection
        warmup_epochs=0,
        updates_per_epoch=len(loader_train),
    )
    updates = 0
    for epoch in range(epochs):
        losses, top1 = AverageMeter(), AverageMeter()
        for images, target in loader_train:
            output = model(images)
            loss = torch.nn.functional.cross_entropy(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)
            losses.update(loss.item(), len(target))
            top1.update(accuracy(output, target)[0].item(), len(target))
        scheduler.step(epoch + 1, losses.avg)
        print(f"epoch {epoch}: {losses.count} samples, loss {losses.avg:.3f}, top-1 {top1.avg:.1f} %")
    print(f"updates: {updates} of {sampler.total_steps}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
