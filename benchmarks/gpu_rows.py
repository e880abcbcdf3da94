"""The first rows of a store as ``numpy.save`` writes them, float16 [4096, D]. A part of ``on_gpu.py``.

python benchmarks/gpu_rows.py .data/cifar10.store .data/cifar16.npy
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from gstds_cache import EmbeddingStore

ROWS = 4096


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("store")
    made.add_argument("file", type=Path)
    arguments = made.parse_args(argv)
    store = EmbeddingStore(arguments.store)
    rows = np.asarray(store.gather(np.arange(min(ROWS, len(store)))), dtype=np.float16)
    part = arguments.file.with_name(f"{arguments.file.name}.part.npy")
    np.save(part, rows)
    part.replace(arguments.file)
    print(f"{arguments.file}: {rows.shape[0]:,} rows of {rows.shape[1]:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
