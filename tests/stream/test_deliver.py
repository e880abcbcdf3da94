"""A finished selection is found beside its store, wherever it is wanted; nothing is computed twice."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from small_store import fill

from gstds_cache.config import SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.deliver import deliver_computed, deliver_kept, path_to_keep


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    fill(tmp_path / "store")
    return EmbeddingStore(tmp_path / "store")


def selector(store: EmbeddingStore, seed: int = 0) -> BatchSelector:
    return BatchSelector(store, SelectConfig(batch_size=8, epochs=2, knn=3, rule="random", seed=seed, device="cpu"))


def compute(made: BatchSelector, out) -> list[str]:
    said: list[str] = []
    assert len(list(deliver_computed(made, out, notify=said.append))) == made.plan.total_batches
    return said


def found(made: BatchSelector, out, *, replace: bool = False) -> list[str]:
    said: list[str] = []
    assert deliver_kept(made, out, replace=replace, notify=said.append) == bool(said)
    return said


def test_what_was_written_once_is_found_for_a_file_and_for_a_pipe(store, tmp_path) -> None:
    made, first, second, pipe = selector(store), tmp_path / "first.arrow", tmp_path / "second.arrow", io.BytesIO()
    kept = path_to_keep(made).path
    assert kept.parent == tmp_path / "store.selections"
    assert found(made, first) == found(made, pipe) == []
    assert not first.exists()
    assert pipe.getvalue() == b""
    assert compute(made, first) == []
    again = selector(store)
    assert found(again, first) == [f"this selection is in {first} already, nothing was computed"]
    assert found(again, second) == [f"this selection was in {kept} already, and was copied"]
    assert found(again, kept) == [f"this selection is in {kept} already, nothing was computed"]
    assert found(again, pipe) == [f"this selection is in {kept} already, nothing is computed"]
    assert again.counts.batches == 0
    assert first.read_bytes() == second.read_bytes() == kept.read_bytes() == pipe.getvalue()
    assert found(selector(store, seed=1), pipe) == []


@pytest.mark.parametrize("held", [b"", b"garbage", b"ARROW1"])
def test_a_kept_selection_that_is_damaged_is_made_again(store, tmp_path, held: bytes) -> None:
    kept = path_to_keep(selector(store)).path
    kept.write_bytes(held)
    assert found(selector(store), kept) == []
    compute(selector(store), kept)
    assert found(selector(store), kept) == [f"this selection is in {kept} already, nothing was computed"]
    (tmp_path / "own.arrow").write_bytes(held)
    with pytest.raises(UsageError, match="the file holds no whole selection"):
        deliver_kept(selector(store, seed=1), tmp_path / "own.arrow", replace=False, notify=print)


def test_a_store_shares_what_is_derived_from_it_with_links_to_it(store, tmp_path) -> None:
    compute(selector(store), io.BytesIO())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "store")
    linked = selector(EmbeddingStore(tmp_path / "elsewhere" / "link"))
    assert found(linked, tmp_path / "file.arrow")[0].endswith("and was copied")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["link"]


def test_a_pipe_leaves_what_a_file_leaves(store, tmp_path) -> None:
    compute(selector(store), io.BytesIO())
    assert found(selector(store), tmp_path / "file.arrow")[0].endswith("and was copied")


def test_a_file_that_holds_another_selection_is_replaced_when_told_to(store, tmp_path) -> None:
    file = tmp_path / "one.arrow"
    compute(selector(store, seed=1), file)
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"one\.arrow"):
        found(selector(store), file)
    assert file.read_bytes() == before
    assert found(selector(store), file, replace=True) == []
    compute(selector(store), file)
    assert found(selector(store), file)


def test_where_nothing_can_be_written_beside_the_store_it_is_kept_in_the_cache(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store.selections").write_text("a file in the place of the folder")
    assert compute(selector(store), tmp_path / "one.arrow") == []
    (kept,) = (tmp_path / "cache" / "derived").glob("store-*.selections/*.arrow")
    assert found(selector(store), tmp_path / "two.arrow") == [f"this selection was in {kept} already, and was copied"]
    pipe = io.BytesIO()
    assert found(selector(store), pipe) == [f"this selection is in {kept} already, nothing is computed"]
    assert pipe.getvalue() == kept.read_bytes()


def test_where_nothing_can_be_kept_the_file_is_delivered(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store.selections").write_text("a file in the place of the folder")
    (tmp_path / "cache").write_text("another")
    for made, out in ((selector(store), tmp_path / "one.arrow"), (selector(store), io.BytesIO())):
        (said,) = compute(made, out)
        assert said.startswith("not kept for other runs: ")
        assert "store.selections" in said
        assert "cache" in said
    assert found(selector(store), tmp_path / "one.arrow")
