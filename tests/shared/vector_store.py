"""A store of vectors that a test chose: what audits and core sets look at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import open_writer


def vector_store(
    where: Path,
    rows: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    classes: Sequence[str] = ("a", "b", "c"),
    same_bytes: Sequence[tuple[int, int]] = (),
    bad: Sequence[int] = (),
    model: str = "m",
    shard_rows: int = 64,
) -> EmbeddingStore:
    """Store ``rows``.

    Args:
        where: The folder.
        rows: Embeddings, [N, D].
        labels: Labels; none by default.
        classes: Names of classes.
        same_bytes: Pairs of rows of which the second has the bytes of the first.
        bad: Rows that are quarantined.
        model: Name of the model.
        shard_rows: Rows of a shard.

    Returns:
        The store, opened.
    """
    count = len(rows)
    given = np.full(count, -1, np.int64) if labels is None else np.asarray(labels, np.int64)
    hashes = np.frombuffer(b"".join(hashlib.sha256(f"{row}".encode()).digest() for row in range(count)), np.uint8)
    hashes = hashes.reshape(count, 32).copy()
    for one, other in same_bytes:
        hashes[other] = hashes[one]
    manifest = DatasetManifest("test", tuple(f"item/{row:05d}" for row in range(count)), hashes, given, tuple(classes))
    spec = CacheSpec(
        items=count, items_root=manifest.root, encoder={"model": model, "preprocessing": {"crop": [4, 4]}},
        dim=rows.shape[1], dtype="float32", batch_size=4, shard_rows=shard_rows,
    )  # fmt: skip
    stored = np.array(rows, np.float32)
    stored[list(bad)] = 0
    attributes = {"kind": "test", "classes": list(classes), "provenance": {"command": ["gstds-embed", "test"]}}
    with open_writer(where, spec, labels=given, items=manifest.to_arrow(), attributes=attributes) as writer:
        for shard in range(spec.shards):
            span = spec.rows_of(shard)
            broken = [Quarantined(row, f"item/{row:05d}", "broken") for row in bad if row in span]
            writer.commit(shard, stored[span.start : span.stop], broken)
        writer.finish()
    return EmbeddingStore(where)


def clustered(
    count: int, dim: int = 16, classes: int = 3, *, spread: float = 0.6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows around a centre for each class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return rng.normal(size=(classes, dim))[labels] + spread * rng.normal(size=(count, dim)), labels
