"""Damage done with ordinary file operations: what a plain Zarr reader would have seen, and what ours says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from gstds_cache.errors import ChunkCorruptError
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify

_spec = importlib.util.spec_from_file_location("_store_tests", Path(__file__).parents[1] / "store" / "test_store.py")
store_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(store_tests)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store_tests.fill(tmp_path / "s")
    return tmp_path / "s"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


SIZE_CHANGING: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("damage", SIZE_CHANGING.values(), ids=SIZE_CHANGING)
def test_a_damaged_size_is_found_when_the_store_is_opened(store: Path, damage) -> None:
    damage(store / layout.object_key(1))
    with pytest.raises(ChunkCorruptError, match="unit 1") as caught:
        EmbeddingStore(store)
    assert f"rm -f {store}/COMPLETE.json {store}/receipts/1.json" in caught.value.hint
    assert [problem.startswith("unit 1:") for problem in verify(store).problems] == [True]


def test_a_plain_reader_takes_a_deleted_object_for_nan(store: Path) -> None:
    (store / layout.object_key(1)).unlink()
    assert np.isnan(zarr.open_group(store, mode="r")["embeddings"][8:16]).all()


def test_an_object_deleted_after_opening_is_an_error_too(store: Path) -> None:
    opened = EmbeddingStore(store, memory_budget=0)
    (store / layout.object_key(1)).unlink()
    with pytest.raises(ChunkCorruptError, match="unit 1"):
        opened.gather(np.array([9]))


def test_a_flipped_byte_is_found_on_reading_and_by_a_full_verify(store: Path) -> None:
    _flip(store / layout.object_key(2))
    opened = EmbeddingStore(store)
    with pytest.raises(ChunkCorruptError, match="unit 2"):
        opened.gather(np.array([20]))
    assert verify(store, "quick").problems == ()
    assert [problem.partition(":")[0] for problem in verify(store, "full").problems] == ["unit 2"]


@pytest.mark.parametrize("key", [layout.LABEL, layout.VALID, layout.ITEMS, "embeddings/zarr.json"])
def test_damage_to_a_small_object_is_found_when_the_store_is_opened(store: Path, key: str) -> None:
    _flip(store / key)
    with pytest.raises(ChunkCorruptError, match=key):
        EmbeddingStore(store)


def test_a_receipt_of_other_rows_is_found_when_the_store_is_opened(store: Path) -> None:
    path = store / layout.receipt_key(0)
    path.write_bytes(path.read_bytes().replace(b"broken", b"broke!"))
    with pytest.raises(ChunkCorruptError, match="receipts are not the ones"):
        EmbeddingStore(store)


def test_the_mending_that_the_error_tells_redoes_one_unit(store: Path) -> None:
    _flip(store / layout.object_key(1))
    whole = {unit: (store / layout.object_key(unit)).stat().st_mtime_ns for unit in (0, 2)}
    (store / layout.COMPLETE).unlink()
    (store / layout.receipt_key(1)).unlink()
    with store_tests.opened(store) as writer:
        assert sorted(writer.recover()) == [0, 2]
        writer.commit(1, store_tests.make_rows()[8:16])
        writer.finish()
    assert whole == {unit: (store / layout.object_key(unit)).stat().st_mtime_ns for unit in (0, 2)}
    np.testing.assert_array_equal(EmbeddingStore(store).gather(np.array([9])), store_tests.make_rows()[[9]])
