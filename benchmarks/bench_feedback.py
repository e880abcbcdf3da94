"""What drawing by training losses costs beside a training step: CPU seconds a step, and bytes a row.

    python benchmarks/bench_feedback.py [--rows 50000] [--batch 256]

A made-up store of [rows, 64] and 10 classes; a quarter of each batch is trained on. In turn, epoch by epoch: the
sampler of a selection of kept rows (its indices are only read), the sampler of candidates drawn by
``loss-minus-reference`` whose losses are reported after each step, and bare steps of ``conv3`` at 32 pixels with as
many rows, one thread each. The cost of feedback is the difference of the first two.

And what selecting candidates costs, 16 epochs of batches of twice as many rows, from their second epoch on held in
memory, beside making them in each epoch, as where there is no memory for them, and beside random rows.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_growth import write_store
from harness import limit_threads, parser, report, spread
from torch.nn.functional import cross_entropy

from gstds_cache import SelectedBatchSampler, select
from gstds_cache.config import SelectConfig, TrainConfig
from gstds_cache.selection import offers
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.writer import write_file
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import build_optimizer

STEPS = 40  # bare steps a trial
EPOCHS = 16  # of a selection


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


def selecting(store: Path, out: Path, batch: int, **how: Any) -> Callable[[], float]:
    """CPU seconds of selecting some epochs into a file, at each call."""
    usual: dict[str, Any] = {"schedule": "constant:0.75", "epochs": EPOCHS, "batch_size": batch, "guidance": "none"}
    config = SelectConfig(device="cpu", threads=1, **usual, **how)

    def one() -> float:
        out.unlink(missing_ok=True)
        begun = time.process_time()
        with closing(write_file(BatchSelector(EmbeddingStore(store), config), out)) as written:
            deque(written, maxlen=0)
        return time.process_time() - begun

    return one


@contextmanager
def nothing_held() -> Iterator[None]:
    """Candidates are made in each epoch meanwhile."""
    before, offers.MOST_HELD = offers.MOST_HELD, -1
    try:
        yield
    finally:
        offers.MOST_HELD = before


def measure_selecting(store: Path, folder: Path, batch: int, trials: int) -> dict[str, Any]:
    """Core seconds of the three, in turn."""
    candidates = selecting(store, folder / "c.arrow", batch, draw="loss")
    rows = selecting(store, folder / "r.arrow", batch, rule="random")
    seconds: dict[str, list[float]] = {"held in memory": [], "made in each epoch": [], "random rows": []}
    for trial in range(trials + 1):
        held = candidates()
        with nothing_held():
            made = candidates()
        for name, spent in zip(seconds, (held, made, rows()), strict=True):
            seconds[name] += [spent] if trial else []  # the first compiles
    both = zip(seconds["held in memory"], seconds["made in each epoch"], strict=True)
    return {
        "epochs": EPOCHS,
        "batch": batch,
        "core_seconds": {name: spread(values) for name, values in seconds.items()},
        "held_over_made": spread([held / made for held, made in both]),
    }


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
        "selecting": measure_selecting(store, folder, 2 * batch, trials),
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
