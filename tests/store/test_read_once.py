"""What is read, and how often, seen where it leaves the package: each commit record once in a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import real_store
from real_store import ITEMS, SHARDS

from gstds_cache.config import SelectConfig
from gstds_cache.files.location import Location
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store import layout
from gstds_cache.store.describe import summarise
from gstds_cache.store.factory import open_transport
from gstds_cache.store.format import CURRENT
from gstds_cache.store.local import LocalTransport
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify

ONCE = {CURRENT.commit_key(shard): 1 for shard in range(SHARDS)}


class Reads:
    """A place for a store, and the objects that were read there."""

    def __init__(self, where: str, taken: Callable[[], list[str]]) -> None:
        self.where, self._taken = where, taken

    def __call__(self, act: Callable[[], object], of: str = "commits/") -> dict[str, int]:
        """How often ``act`` reads each object of a folder."""
        self._taken()
        act()
        return dict(Counter(key for key in self._taken() if key.startswith(of)))


@pytest.fixture(params=["directory", "bucket"])
def reads(request: pytest.FixtureRequest, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    keys: list[str] = []
    if request.param == "bucket":
        where, proxy = request.getfixturevalue("faulty_s3")

        def taken() -> list[str]:
            paths = [path for method, path in proxy.requests if method == "GET"]
            proxy.requests.clear()
            return [match[1] for path in paths if (match := re.search("/store/(.+)", path))]

        return Reads(where, taken)

    get, pieces = LocalTransport.get, LocalTransport.pieces
    monkeypatch.setattr(LocalTransport, "get", lambda self, key: keys.append(key) or get(self, key))
    monkeypatch.setattr(LocalTransport, "pieces", lambda self, key: keys.append(key) or pieces(self, key))

    def taken() -> list[str]:
        seen = keys.copy()
        keys.clear()
        return seen

    return Reads(str(tmp_path / "store"), taken)


def test_each_commit_record_is_read_once(reads: Reads) -> None:
    where = reads.where
    assert reads(lambda: real_store.embed(where)) == {}, "a first run knows what it wrote"
    assert reads(lambda: EmbeddingStore(where)) == ONCE
    assert reads(lambda: real_store.embed(where)) == ONCE, "a hit"
    assert reads(lambda: summarise(where)) == ONCE
    assert reads(lambda: verify(where)) == reads(lambda: verify(where, "full")) == ONCE

    def select() -> None:
        store = EmbeddingStore(where, access="memory")
        for _ in BatchSelector(
            store, SelectConfig(batch_size=10, epochs=2, knn=3, guidance="none", device="cpu", threads=2)
        ).run():
            pass

    assert reads(select) == ONCE
    assert reads(select, "embeddings/c/") == {layout.object_key(shard): 1 for shard in range(SHARDS)}


def test_a_run_that_goes_on_reads_each_commit_record_once(reads: Reads) -> None:
    real_store.embed(reads.where)
    transport = open_transport(Location.parse(reads.where))
    for key in (layout.COMPLETE, CURRENT.commit_key(1), layout.object_key(1)):
        transport.delete(key)
    images = []
    assert reads(lambda: images.append(real_store.embed(reads.where).embedded)) == {
        CURRENT.commit_key(shard): 1 for shard in (0, 2)
    }
    assert images == [8]
    (transport.delete(layout.COMPLETE), real_store.embed(reads.where))
    assert len(EmbeddingStore(reads.where)) == ITEMS


def test_a_repair_reads_each_commit_record_to_look_to_write_and_to_check(reads: Reads) -> None:
    real_store.embed(reads.where)
    open_transport(Location.parse(reads.where)).delete(layout.object_key(1))
    counts = reads(lambda: real_store.repair(reads.where))
    assert counts == {CURRENT.commit_key(0): 3, CURRENT.commit_key(1): 2, CURRENT.commit_key(2): 3}
