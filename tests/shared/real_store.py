"""A store that a real run of embedding makes in a tenth of a second: 22 images, three shards of eight, row 3 broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from gstds_cache.config import EmbedConfig
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.embedding import estimate
from gstds_cache.embedding.append import AppendReport, append_dataset
from gstds_cache.embedding.repair import RepairReport
from gstds_cache.embedding.repair import repair as repair_shards
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.embed_report import EmbedReport
from gstds_cache.store.format import CURRENT
from gstds_cache.store.writer import StoreWriter

ITEMS, BATCH, SHARD = 22, 4, 8
SHARDS = 3
GROWN = 34
"""Items of the data set once it has grown: the last shard of the first three is filled, and two are added."""
BAD = 3
MODEL = "real_store:build"

# The run's own measurement of its speed would take longer than the run.
estimate.FORWARD_SECONDS = 1e-4
estimate.IMAGES = 2


class Images:
    """An in-memory data set of random images (:class:`gstds_cache.data.source.ImageSource`)."""

    uri = kind = "memory"
    classes = ("a", "b", "c")
    mirror_safe = True
    notes = ()
    files = None

    def __init__(self, count: int = ITEMS, *, seed: int = 0, bad: int | None = BAD) -> None:
        self.seed, self.bad = seed, bad
        self.ids = [f"item/{row:04d}" for row in range(count)]
        self.labels = np.arange(count, dtype=np.int64) % 3

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        return np.random.default_rng([self.seed, row]).integers(0, 256, (8, 8, 3), dtype=np.uint8).tobytes()

    def image(self, row: int) -> Image.Image:
        if row == self.bad:
            raise UndecodableError("made to fail")
        return Image.frombytes("RGB", (8, 8), self.payload(row))


class Tiny(nn.Module):
    """Mean colour of a 2 x 2 grid: a real model, of which no two images have the same features."""

    preprocessing = Preprocessing(resize=8, crop=(8, 8))

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def build(**_: str) -> nn.Module:
    return Tiny()


def encoder() -> Encoder:
    return open_encoder(MODEL)


def embed(where: Path | str, source: Images | None = None) -> EmbedReport:
    config = EmbedConfig(model=MODEL, batch_size=BATCH, shard_rows=SHARD, workers=0, device="cpu")
    return embed_dataset(source or Images(), config, where=where).report


def repair(where: Path | str, source: Images | None = None) -> RepairReport:
    return repair_shards(where, source or Images(), encoder(), device="cpu", workers=0)


def append(where: Path | str, source: Images) -> AppendReport:
    """Append what is new in ``source``, as :func:`gstds_cache.append_to_store` does."""
    return append_dataset(
        Location.parse(where).absolute(),
        source,
        EmbedConfig(model=MODEL, workers=0, device="cpu"),
        progress=lambda *_: None,
        notify=lambda _: None,
        hash_cache=HashCache(),
    )


@contextmanager
def shards_written() -> Iterator[list[int]]:
    """The shards that the block computes and commits, seen where they reach the store."""
    seen: list[int] = []
    commit = StoreWriter.commit

    def watched(self, shard, rows, quarantined=()):
        seen.append(shard)
        return commit(self, shard, rows, quarantined)

    StoreWriter.commit = watched
    try:
        yield seen
    finally:
        StoreWriter.commit = commit


def objects_of(store: Path) -> dict[str, bytes]:
    """Every object; names with a leading dot are none."""
    return {key: path.read_bytes() for key, path in files_of(store).items() if not path.name.startswith(".")}


def files_of(store: Path) -> dict[str, Path]:
    return {p.relative_to(store).as_posix(): p for p in sorted(store.rglob("*")) if p.is_file()}


def leftovers(store: Path) -> list[str]:
    """Temporary files, and shards' objects without a commit record."""
    files = files_of(store)
    committed = {layout.object_key(shard) for shard in committed_shards(store)}
    return [
        key
        for key in files
        if key.endswith(".tmp") or (key.startswith("embeddings/c/") and key not in committed)
    ]  # fmt: skip


def committed_shards(store: Path) -> list[int]:
    return sorted(int(path.stem) for path in (store / "commits").glob("[0-9]*.json"))


def stamps(store: Path, shards: list[int] | None = None) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the commit records and objects of ``shards`` (default: of all that are committed)."""
    keys = [key(shard) for shard in committed_shards(store) if shards is None or shard in shards
            for key in (CURRENT.commit_key, layout.object_key)]  # fmt: skip
    return {key: ((store / key).stat().st_ino, (store / key).stat().st_mtime_ns) for key in keys}
