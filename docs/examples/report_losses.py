"""A plain PyTorch loop on candidates: it reports the losses it computes anyway, and is killed and gone on with.

python report_losses.py SELECTION ITEMS
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gstds_cache import SelectedBatchSampler


class Run:
    """All that a loop needs, and all that its checkpoint holds."""

    def __init__(self, selection: str, dataset: TensorDataset) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 3)
        self.sampler = SelectedBatchSampler(selection, dataset=dataset, importance_weights=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loader = DataLoader(
            dataset, batch_sampler=self.sampler, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
        )
        self.step = 0

    def train(self, until: int) -> None:
        while self.step < until:
            for features, labels in self.loader:
                losses = cross_entropy(self.model(features), labels, reduction="none")
                self.optimizer.zero_grad()
                (losses * self.sampler.weights()).mean().backward()
                self.optimizer.step()
                self.step += 1
                self.sampler.report(losses, step=self.step)
                if self.step == until:
                    return

    def checkpoint(self) -> dict[str, object]:
        # Workers have read ahead: the sampler is told how many steps were trained.
        return {"model": self.model.state_dict(), "sampler": self.sampler.state_dict(step=self.step), "step": self.step}

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.sampler.load_state_dict(checkpoint["sampler"])
        self.step = checkpoint["step"]


def main(selection: str, items: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(items, 8, generator=generator), torch.arange(items) % 3)
    whole = Run(selection, dataset)
    whole.train(whole.sampler.total_steps)
    killed = Run(selection, dataset)
    killed.train(killed.sampler.total_steps // 2)
    again = Run(selection, dataset)
    again.restore(killed.checkpoint())
    begun = again.step
    again.train(again.sampler.total_steps)
    same = all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    print(f"steps: {whole.step}; gone on with after step {begun}: {'the same' if same else 'other'} weights")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
