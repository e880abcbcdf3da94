"""What one rank does under torchrun: writes down the rows it is given, then is ``gstds-train``.

``torchrun ... ranks_driver.py ROWS_DIR SELECTION [words of gstds-train ...]``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gstds_cache.cli.train_command import main

from gstds_cache.costs.energy import used_device
from gstds_cache.training.distributed import Ranks, process_group
from gstds_cache.training.sampler import SelectedBatchSampler


def write_rows(ranks: Ranks, where: Path, selection: str) -> None:
    """The rows of every step on this rank, under each policy."""
    rows = {}
    for tail in ("pad", "drop"):
        sampler = SelectedBatchSampler(selection, tail=tail, batch_size=None if tail == "pad" else 8)
        assert (sampler.rank, sampler.world_size) == (ranks.rank, ranks.world_size)
        rows[tail] = [batch for _ in range(sampler.epochs) for batch in sampler]
        steps = ranks.sums([len(rows[tail])])
        assert [device.uuid for device in ranks.gather(used_device(ranks.device))] == [""] * ranks.world_size
        assert steps == [len(rows[tail]) * ranks.world_size]
    (where / f"{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    with process_group("cpu") as joined:
        write_rows(joined, Path(sys.argv[1]), sys.argv[2])
        main(sys.argv[3:])
