"""What drawing by training losses costs beside a training step: CPU seconds a step, and bytes a row.

    python benchmarks/bench_feedback.py [--rows 50000] [--batch 256]

A made-up store of [rows, 64] and 10 classes; a quarter of each batch is trained on. In turn, epoch by epoch: the
sampler of a selection of kept rows (its indices are only read), the sampler of candidates drawn by
``loss-minus-reference`` whose losses are reported after each step, and bare steps of ``conv3`` at 32 pixels with as
many rows, one thread each. The cost of feedback is the difference of the first two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_growth import write_store
from harness import limit_threads, parser, report, spread
from torch.nn.functional import cross_entropy

from gstds_cache import SelectedBatchSampler, select
from gstds_cache.config import TrainConfig
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import build_optimizer

STEPS = 40  # bare steps a trial


def epochs_of(path: Path, losses: torch.Tensor | None) -> Callable[[], float]:
    """CPU seconds a step of one epoch of a sampler, an epoch at each call."""
    sampler = SelectedBatchSampler(path)

    def one() -> float:
        begun, steps = time.process_time(), 0
        for rows in sampler:
            steps += 1
            if losses is not None:
                sampler.report(losses[: len(rows)])
        return (time.process_time() - begun) / steps

    return one


def bare_steps(rows: int) -> Callable[[], float]:
    """CPU seconds of a step of ``conv3`` with ``rows`` rows."""
    network = build_network("conv3", classes=10, side=32, seed=0)
    optimizer = build_optimizer(network, TrainConfig())
    pixels, target = torch.randn(rows, 3, 32, 32), torch.arange(rows) % 10

    def some() -> float:
        begun = time.process_time()
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(network(pixels), target).backward()
            optimizer.step()
        return (time.process_time() - begun) / STEPS

    return some


def measure(folder: Path, rows: int, batch: int, trials: int) -> dict[str, Any]:
    """All of it, interleaved."""
    store = folder / "rows.store"
    write_store(store, rows)
    usual: dict[str, Any] = {"keep": 0.25, "epochs": trials + 2, "batch_size": batch, "guidance": "none"}
    kept, offered = (
        Path(select(store, out=folder / f"{name}.arrow", progress=False, **usual, **more).path)
        for name, more in (("kept", {"rule": "random"}), ("candidates", {"draw": "loss-minus-reference"}))
    )
    losses = torch.rand(rows)
    cases = {
        "kept rows": epochs_of(kept, None),
        "candidates, losses reported": epochs_of(offered, losses),
        "bare step": bare_steps(batch // 4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for trial in range(trials + 1):
        for name, one in cases.items():
            spent = one()
            if trial:  # the first epoch is drawn without losses, and compiles
                seconds[name].append(spent)
    both = zip(seconds["candidates, losses reported"], seconds["kept rows"], seconds["bare step"], strict=True)
    return {
        "rows": rows,
        "batch": batch,
        "kept": batch // 4,
        "ms_a_step": {name: spread([1e3 * value for value in values]) for name, values in seconds.items()},
        "share_of_a_step": spread([(ours - theirs) / step for ours, theirs, step in both]),
        "bytes_a_row": SelectedBatchSampler(offered).losses.nbytes / rows,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=50_000)
    made.add_argument("--batch", type=int, default=256)
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.trials = 2048, 1
    limit_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report("feedback", measure(Path(folder), arguments.rows, arguments.batch, arguments.trials), arguments)


if __name__ == "__main__":
    main()
