"""A small store that several tests make: 22 rows of 5 in three shards, row 3 quarantined."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import open_writer

N, D, SHARD = 22, 5, 8
LABELS = np.arange(N, dtype=np.int64) - 1
SHA256 = np.frombuffer(b"".join(hashlib.sha256(bytes([row])).digest() for row in range(N)), np.uint8).reshape(N, 32)
MANIFEST = DatasetManifest("test", tuple(f"item/{row}" for row in range(N)), SHA256, LABELS, ("a",))


def make_spec(**changes) -> CacheSpec:
    fields = {
        "items": N, "items_root": MANIFEST.root, "encoder": {"model": "m", "preprocessing": {"crop": [4, 4]}}, "dim": D,
        "dtype": "float16", "batch_size": 4, "shard_rows": SHARD,
    }  # fmt: skip
    return CacheSpec(**(fields | changes))


def make_rows() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(N, D)).astype(np.float16)
    rows[3] = 0  # quarantined
    return rows


def opened(where: Path | str, spec: CacheSpec | None = None):
    attributes = {"kind": "test", "classes": ["a"], "provenance": {"command": ["gstds-embed", "imagefolder:my photos"]}}
    return open_writer(where, spec or make_spec(), labels=LABELS, items=MANIFEST.to_arrow(), attributes=attributes)


def fill(where: Path | str, shards=(0, 1, 2), finish: bool = True) -> None:
    rows, spec = make_rows(), make_spec()
    with opened(where) as writer:
        for shard in shards:
            span = spec.rows_of(shard)
            bad = [Quarantined(3, "item/3", "broken")] if shard == 0 else []
            writer.commit(shard, rows[span.start : span.stop], bad)
        if finish:
            writer.finish()
