"""How selection grows with the number of rows: time per batch, and memory, over synthetic stores.

    python benchmarks/bench_growth.py [--rows 10000 100000 1000000 10000000]

Each store is [rows, 64] float16 and read from its mirror, in exact random order. Time per batch must not depend on the
rows. Memory beyond the mapped file grows by what is held of each row: its label, whether it takes part, its place in
the orders of two epochs, and what numbering them took once, since freed memory is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import Ours
from harness import parser, report, spread

from gstds_cache.config import SelectConfig
from gstds_cache.devices import cores, limit_threads
from gstds_cache.memory import keep_freed_memory
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore

DIM = 64


def make_store(folder: Path, rows: int) -> Path:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, DIM), dtype=np.float32)
    made = np.empty((rows, DIM), np.float16)
    for first in range(0, rows, 1 << 20):
        part = made[first : first + (1 << 20)]
        part[:] = centres[rng.integers(0, 100, len(part))] + rng.standard_normal(part.shape, dtype=np.float32)
    Ours().write(folder / f"{rows}.store", made)
    EmbeddingStore(folder / f"{rows}.store", access="mirror").gather(np.arange(1))
    return folder / f"{rows}.store"


def of_status(name: str) -> float:
    """A line of the kernel's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def child(store: str, batches: int) -> None:
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    limit_threads(cores())
    opened = EmbeddingStore(store, access="mirror", memory_budget=0)
    begun = time.perf_counter()
    selector = BatchSelector(opened, SelectConfig(threads=0, epochs=1000, device="cpu"))
    runs = selector.run()
    next(runs)  # compiles, and makes the first order of all rows
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _, _ in zip(range(batches), runs, strict=False):
        pass
    spent = time.perf_counter() - begun
    print(json.dumps({"ms_per_batch": 1e3 * spent / batches, "first_batch_seconds": first, "MB": of_status("RssAnon")}))


def measure(store: Path, batches: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(store), "--batches", str(batches)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    made.add_argument("--batches", type=int, default=256)
    made.add_argument("--child")
    arguments = made.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batches)
        return
    if arguments.smoke:
        arguments.rows, arguments.batches, arguments.trials = [600, 1200], 2, 1
    with tempfile.TemporaryDirectory() as folder:
        stores = {rows: make_store(Path(folder), rows) for rows in arguments.rows}
        runs = [
            {rows: measure(store, arguments.batches) for rows, store in stores.items()} for _ in range(arguments.trials)
        ]
    by_rows = {
        rows: {name: spread([run[rows][name] for run in runs]) for name in runs[0][rows]} for rows in arguments.rows
    }
    low, high = arguments.rows[0], arguments.rows[-1]
    report(
        "growth",
        {
            "dim": DIM,
            "batch_size": SelectConfig().batch_size,
            "by_rows": by_rows,
            "time_of_most_over_fewest": spread([run[high]["ms_per_batch"] / run[low]["ms_per_batch"] for run in runs]),
            "bytes_per_further_row": spread([1e6 * (run[high]["MB"] - run[low]["MB"]) / (high - low) for run in runs]),
        },
        arguments,
    )


if __name__ == "__main__":
    main()
