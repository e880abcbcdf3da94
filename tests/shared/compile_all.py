"""Compiles what numba compiles, and Python the first time, so that test processes which begin together need not.

``make test`` runs it beside mypy, which leaves a core free.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from forked import load
from small_store import fill

from gstds_cache.config import SelectConfig
from gstds_cache.selection.run import BatchSelector
from gstds_cache.spectral.fiedler import fiedler_vectors
from gstds_cache.store.reader import EmbeddingStore


def main() -> None:
    with suppress(ImportError):  # what is not installed is not tested either
        load()  # Python keeps what it has compiled
    fiedler_vectors(torch.randn(1, 64, 8), k=5)  # fewer nodes are solved densely
    with TemporaryDirectory() as folder:
        fill(Path(folder) / "store")
        for rule in ("spread", "strata"):
            config = SelectConfig(rule=rule, batch_size=8, epochs=1, knn=3, guidance="none", device="cpu")
            for _ in BatchSelector(EmbeddingStore(f"{folder}/store"), config).run():
                pass


if __name__ == "__main__":
    main()
