"""Importing vectors beside a plain copy of the same bytes that ends with fsync: seconds, the ratio, and memory.

    python benchmarks/bench_import.py [--rows 1000000] [--dim 768] [--trials 3]

The file is a float16 ``.npy`` of unit rows. Every byte of it is hashed twice (as it is judged, and as it is checked
before the store is complete), once as a copy is not at all; the store is durable and checked when the call returns. The
copy's file is removed between trials, and so is the store. Both read from a warm page cache.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import interleaved, parser, report

import gstds_cache
from gstds_cache.store.verify import verify

BLOCK = 1 << 20


def make_vectors(file: Path, rows: int, dim: int) -> None:
    """Unit rows in float16, made a part at a time."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(file, "w+", np.float16, (rows, dim))
    for start in range(0, rows, 1 << 14):
        part = rng.standard_normal((min(1 << 14, rows - start), dim), dtype=np.float32)
        array[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    array.flush()


def copy(source: Path, target: Path) -> None:
    """What is durable and checked by nobody."""
    target.unlink(missing_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, BLOCK)
        written.flush()
        os.fsync(written.fileno())


class OwnMemory:
    """The most anonymous memory of this process while the block lasts: mapped files are page cache."""

    def __enter__(self) -> OwnMemory:
        self.before = self.most = own_bytes()
        self._end = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._watcher.join()


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, rows: int, dim: int, trials: int) -> dict[str, Any]:
    source, target, store = folder / "vectors.npy", folder / "copy.npy", folder / "vectors.store"
    make_vectors(source, rows, dim)

    def bring() -> None:
        shutil.rmtree(store, ignore_errors=True)
        gstds_cache.import_embeddings(source, store, progress=False)

    seconds = interleaved(trials, copy=lambda: copy(source, target), imported=bring)
    begun = time.process_time()
    with OwnMemory() as memory:
        bring()
    cpu = time.process_time() - begun
    opened = gstds_cache.EmbeddingStore(store, access="window")
    some = np.sort(np.random.default_rng(1).choice(rows, min(rows, 1000), replace=False))
    return {
        "rows": rows,
        "dim": dim,
        "bytes": source.stat().st_size,
        "seconds": seconds,
        "import_over_copy": seconds["copy"]["median"] / seconds["imported"]["median"],
        "import_mb_per_second": source.stat().st_size / 1e6 / seconds["imported"]["median"],
        "import_cpu_seconds": cpu,
        "own_memory_mb": (memory.most - memory.before) / 1e6,
        "most_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "same_rows": bool((opened.gather(some) == np.load(source, mmap_mode="r")[some]).all()),
        "problems": len(verify(store, "full").problems),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=1_000_000)
    made.add_argument("--dim", type=int, default=768)
    made.add_argument("--folder", type=Path, help="the disk to measure [default: that of temporary files]")
    arguments = made.parse_args()
    rows, dim, trials = (5000, 64, 1) if arguments.smoke else (arguments.rows, arguments.dim, arguments.trials)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), rows, dim, trials)
    assert result["same_rows"]
    assert not result["problems"]
    report("import", result, arguments)


if __name__ == "__main__":
    main()
