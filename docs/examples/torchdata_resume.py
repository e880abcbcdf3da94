"""torchdata's StatefulDataLoader: stop in the middle of an epoch, go on in a new process with the very next batch.

python torchdata_resume.py SELECTION ITEMS
"""

from __future__ import annotations

import json
import sys

import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from gstds_cache import SelectedBatchSampler


def main(selection: str, items: int) -> None:
    dataset = TensorDataset(torch.arange(items))

    def loader_over(sampler: SelectedBatchSampler) -> StatefulDataLoader:
        return StatefulDataLoader(dataset, batch_sampler=sampler, num_workers=2, multiprocessing_context="spawn")

    expected = SelectedBatchSampler(selection)
    whole = [rows for _ in range(expected.epochs) for rows in expected]

    loader = loader_over(SelectedBatchSampler(selection, dataset=dataset))
    stop = expected.header.batches_per_epoch + 1  # one batch into the second epoch
    seen: list[list[int]] = []
    while len(seen) < stop:
        for (rows,) in loader:
            seen.append(rows.tolist())
            if len(seen) == stop:
                break
    # The workers are several batches ahead. The loader knows which were handed out, so no step= is needed.
    state = loader.state_dict()

    sampler = SelectedBatchSampler(selection, dataset=dataset)
    resumed = loader_over(sampler)
    resumed.load_state_dict(state)
    while sampler.step < sampler.total_steps:
        seen += [rows.tolist() for (rows,) in resumed]
    print(json.dumps({"stopped after": stop, "steps": len(seen), "the same batches": seen == whole}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
