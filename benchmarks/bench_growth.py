"""How selection grows with the number of rows: time per batch, and memory, over synthetic stores.

    python benchmarks/bench_growth.py [--rows 10000 100000 1000000 10000000] [--stores FOLDER]

Each store is [rows, 64] float16 of 200 classes and read from its mirror, in exact random order. `default` is what
`gstds-select` does on a store whose guidance was made before; the batches of small stores come again while time is
taken, and find their graphs. In `anew` every epoch deals its batches anew, without guidance, so that every batch is the
same work. Neither time per batch nor memory beyond the mapped files may depend on the rows. What is held of each row is
its label, in two bytes here. A run has a thousand epochs: what is held of each batch would show.
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
from harness import limit_threads, parser, report, spread

from gstds_cache.config import SelectConfig
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.guidance import DEFAULT, load_or_make_guidance
from gstds_cache.selection.guidance_spec import key_of, parse_guidance
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore

DIM, CLASSES = 64, 200
CASES: dict[str, dict[str, Any]] = {"default": {}, "anew": {"batch_assignments": 0, "guidance": "none"}}


def make_store(folder: Path, rows: int) -> Path:
    store = folder / f"{rows}.store"
    if not store.exists():
        write_store(store, rows)
    opened = EmbeddingStore(store, access="mirror", memory_budget=0)
    opened.gather(np.arange(1))
    load_or_make_guidance(opened, key_of(opened, parse_guidance(DEFAULT)), threads=cores())
    return store


def write_store(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, DIM), dtype=np.float32)
    made, labels = np.empty((rows, DIM), np.float16), rng.integers(0, CLASSES, rows)
    for first in range(0, rows, 1 << 20):
        part = made[first : first + (1 << 20)]
        part[:] = centres[labels[first : first + (1 << 20)]] + rng.standard_normal(part.shape, dtype=np.float32)
    Ours().write(path, made, labels=labels)


def of_status(name: str) -> float:
    """A line of the kernel's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def child(store: str, batches: int, case: str) -> None:
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    limit_threads(cores())
    opened = EmbeddingStore(store, access="mirror", memory_budget=0)
    begun = time.perf_counter()
    selector = BatchSelector(opened, SelectConfig(threads=0, epochs=1000, device="cpu", **CASES[case]))
    runs = selector.run()
    next(runs)  # compiles, lays out the run and opens the guidance
    first = time.perf_counter() - begun
    begun, working = time.perf_counter(), time.process_time()
    for _, _ in zip(range(batches), runs, strict=False):
        pass
    spent, worked = time.perf_counter() - begun, time.process_time() - working
    result = {
        "ms_per_batch": 1e3 * spent / batches,
        "cpu_ms_per_batch": 1e3 * worked / batches,  # of all threads; others on the machine change it less
        "first_batch_seconds": first,
        "MB": of_status("RssAnon"),
    }
    print(json.dumps(result))


def measure(store: Path, batches: int, case: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(store), "--batches", str(batches), "--case", case]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    made.add_argument("--batches", type=int, default=256)
    made.add_argument("--stores", type=Path, help="keep the stores here, and use those of an earlier run")
    made.add_argument("--child")
    made.add_argument("--case", choices=CASES)
    arguments = made.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batches, arguments.case)
        return
    if arguments.smoke:
        arguments.rows, arguments.batches, arguments.trials = [600, 1200], 2, 1
    with tempfile.TemporaryDirectory() as folder:
        stores = {rows: make_store(arguments.stores or Path(folder), rows) for rows in arguments.rows}
        runs = [
            {case: {rows: measure(store, arguments.batches, case) for rows, store in stores.items()} for case in CASES}
            for _ in range(arguments.trials)
        ]
    low, high = arguments.rows[0], arguments.rows[-1]
    cases: dict[str, Any] = {}
    for case in CASES:
        of = [run[case] for run in runs]
        cases[case] = {
            "by_rows": {
                rows: {name: spread([run[rows][name] for run in of]) for name in of[0][rows]} for rows in arguments.rows
            },
            "time_of_most_over_fewest": spread([run[high]["ms_per_batch"] / run[low]["ms_per_batch"] for run in of]),
            "cpu_time_of_most_over_fewest": spread(
                [run[high]["cpu_ms_per_batch"] / run[low]["cpu_ms_per_batch"] for run in of]
            ),
            "memory_of_most_over_fewest": spread([run[high]["MB"] / run[low]["MB"] for run in of]),
            "bytes_per_further_row": spread([1e6 * (run[high]["MB"] - run[low]["MB"]) / (high - low) for run in of]),
        }
    report(
        "growth",
        {"dim": DIM, "classes": CLASSES, "batch_size": SelectConfig().batch_size, "cases": cases},
        arguments,
    )


if __name__ == "__main__":
    main()
