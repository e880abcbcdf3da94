"""Format 1: what is written, what any Zarr reader sees, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from forked import FORKS
from small_store import LABELS, MANIFEST, SHARD, D, N, fill, make_rows, make_spec, opened

from gstds_cache.errors import (
    ChunkCorruptError,
    FingerprintMismatchError,
    IncompleteError,
    IntegrityError,
    NondeterminismError,
    StoreNotFoundError,
    UsageError,
)
from gstds_cache.files.digest import sha256_hex
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.commit_record import Quarantined
from gstds_cache.store.describe import summarise
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "s")
    return tmp_path / "s"


def test_any_zarr_reader_opens_it(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(group["embeddings"][:], make_rows())
    np.testing.assert_array_equal(group["label"][:], LABELS)
    assert group["valid"][:].tolist() == [1, 1, 1, 2] + [1] * 18
    meta = json.loads((store / "embeddings" / "zarr.json").read_text())
    assert (meta["zarr_format"], meta["data_type"], meta["fill_value"]) == (3, "float16", "NaN")
    assert [codec["name"] for codec in meta["codecs"]] == ["bytes", "crc32c"]
    assert group.attrs["gstds"]["spec"] == make_spec().to_dict()


def test_an_all_zero_shard_exists_as_an_object(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as writer:
        commit = writer.commit(0, np.zeros((SHARD, D), np.float16))
    assert (tmp_path / "s" / layout.object_key(0)).stat().st_size == commit.size == SHARD * D * 2 + 4


def test_reading_gives_back_what_was_written(store: Path) -> None:
    opened_store = EmbeddingStore(store)
    picked = np.array([21, 0, 9, 9])
    np.testing.assert_array_equal(opened_store.gather(picked), make_rows()[picked])
    np.testing.assert_array_equal(opened_store.labels, LABELS)
    assert opened_store.quarantined == [Quarantined(3, "item/3", "broken")]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0, 127, -1], 3, np.int8),
        ([0, 1, 2], 128, np.int8),
        ([0, 1, 2], 129, np.int16),
        ([0, 128, -1], 0, np.int16),
        ([5, 32768, -1], 3, np.int32),
        ([-1, 2**40, 3], 3, np.int64),
        ([-(2**63), 2**63 - 1, 0], 3, np.int64),
    ],
)
def test_labels_take_no_more_than_they_need(labels: list[int], classes: int, expected: type) -> None:
    spec = replace(make_spec(), items=len(labels))
    data = bytes(layout.metadata_objects(spec, {}, np.array(labels, np.int64))[layout.LABEL])
    for size in (1, 5, 8, 11, 100):  # pieces that end inside a number, too
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        values = layout.label_values(spec, parts, classes)
        assert values.tolist() == labels
        assert values.dtype == expected
    for damaged in (data[:-1], data + b"0", data[:-1] + bytes([data[-1] ^ 1]), b""):
        with pytest.raises(ValueError, match="expected 28 and a right CRC-32C"):
            layout.label_values(spec, [damaged[:13], damaged[13:]], classes)


def test_a_store_says_what_it_was_made_of(store: Path) -> None:
    reader = EmbeddingStore(store)
    assert (reader.kind, reader.classes, reader.dataset_uri) == ("test", ("a",), None)
    manifest = reader.manifest()
    assert (tuple(manifest.ids), manifest.root) == (tuple(MANIFEST.ids), MANIFEST.root)
    np.testing.assert_array_equal(manifest.labels, LABELS)
    other = replace(MANIFEST, ids=tuple(f"other/{row}" for row in range(N)))
    for data in (b"damaged", bytes(other.to_arrow())):
        (store / layout.ITEMS).write_bytes(data)
        with pytest.raises(ChunkCorruptError, match=r"items\.arrow is not the list of items"):
            reader.manifest()


def test_a_file_url_is_the_directory_it_names(tmp_path: Path) -> None:
    path = tmp_path / "my photos #1"
    fill(path.as_uri())
    assert path.as_uri().startswith("file:///")
    assert "%20" in path.as_uri()
    np.testing.assert_array_equal(EmbeddingStore(path).gather(np.array([9])), make_rows()[[9]])
    assert EmbeddingStore(path.as_uri()).location == Location(path)
    assert verify(path.as_uri(), "full").problems == ()


def test_a_store_larger_than_memory_reads_the_same_rows(store: Path) -> None:
    small = EmbeddingStore(store, memory_budget=0, access="window")
    picked = np.array([21, 0, 9, 9, 16])
    np.testing.assert_array_equal(small.gather(picked), make_rows()[picked])


@pytest.mark.parametrize(("row", "words"), [(3, "no embedding"), (22, "0..21"), (-1, "0..21")])
def test_a_row_without_an_embedding_is_an_error_and_never_zeros(store: Path, row: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EmbeddingStore(store).gather(np.array([row]))


def test_commits_say_what_is_on_the_disk(store: Path) -> None:
    for shard in range(3):
        commit = json.loads((store / CURRENT.commit_key(shard)).read_text())
        data = (store / layout.object_key(shard)).read_bytes()
        assert (commit["object_sha256"], commit["size"]) == (sha256_hex(data), len(data))
        start, stop = commit["rows"]
        assert commit["content_sha256"] == sha256_hex(make_rows()[start:stop].tobytes())
    complete = json.loads((store / layout.COMPLETE).read_text())
    assert (complete["items"], complete["ok"], complete["quarantined"]) == (22, 21, 1)


def test_the_same_rows_give_the_same_bytes_in_every_file(store: Path, tmp_path: Path) -> None:
    fill(tmp_path / "t", shards=(2, 0, 1))
    files = sorted(p.relative_to(store) for p in store.rglob("*") if p.is_file())
    assert (
        len(files) == 4 + 3 + 2 + 3 + 2 + 1
    )  # zarr.json, shards, label and valid, commit records, items + COMPLETE, .lock
    assert files == sorted(p.relative_to(tmp_path / "t") for p in (tmp_path / "t").rglob("*") if p.is_file())
    for name in files:
        assert (store / name).read_bytes() == (tmp_path / "t" / name).read_bytes(), name


def test_an_incomplete_store_is_refused_and_says_how_to_finish_it(tmp_path: Path) -> None:
    fill(tmp_path / "s", shards=(0, 2), finish=False)
    with pytest.raises(IncompleteError, match="2 of 3 shards") as caught:
        EmbeddingStore(tmp_path / "s")
    assert "gstds-embed 'imagefolder:my photos' --cache" in caught.value.hint
    partial = EmbeddingStore(tmp_path / "s", allow_partial=True)
    assert np.flatnonzero(partial.valid == layout.MISSING).tolist() == list(range(8, 16))
    with pytest.raises(UsageError, match="no embedding"):
        partial.gather(np.array([9]))
    with opened(tmp_path / "s") as writer, pytest.raises(IncompleteError, match=r"\[1\]"):
        writer.finish()


def test_recovery_drops_objects_without_commit_and_dead_temporaries_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    fill(path, shards=(0, 1), finish=False)
    (path / CURRENT.commit_key(1)).unlink()
    dead = [path / "embeddings/c/1" / name for name in (".0.4194303-0123abcd.tmp", ".0.4194303.tmp")]
    for file in dead:
        file.write_bytes(b"half")
    with opened(path) as writer:
        assert sorted(writer.recover()) == [0]
    assert not (path / layout.object_key(1)).exists()
    assert not any(file.exists() for file in dead)
    assert (path / layout.object_key(0)).exists()


def test_a_second_commit_of_the_same_rows_succeeds_and_of_others_is_loud(tmp_path: Path) -> None:
    rows = make_rows()[:SHARD]
    with opened(tmp_path / "s") as writer:
        first = writer.commit(0, rows)
        assert writer.commit(0, rows) == first
        before = (tmp_path / "s" / layout.object_key(0)).read_bytes()
        with pytest.raises(NondeterminismError, match="shard 0"):
            writer.commit(0, rows + 1)
    assert (tmp_path / "s" / layout.object_key(0)).read_bytes() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_never_committed(tmp_path: Path, bad: float) -> None:
    rows = make_rows()[:SHARD]
    rows[2, 1] = bad
    with opened(tmp_path / "s") as writer, pytest.raises(UsageError, match="NaN or Inf"):
        writer.commit(0, rows)


def test_a_late_write_is_caught_before_complete(tmp_path: Path) -> None:
    path = tmp_path / "s"
    fill(path, finish=False)
    other = layout.shard_object(make_spec(), 1, np.ones((SHARD, D), np.float16))
    (path / layout.object_key(1)).write_bytes(other)
    with opened(path) as writer, pytest.raises(ChunkCorruptError, match="shard 1"):
        writer.finish()
    assert not (path / layout.COMPLETE).exists()


@pytest.mark.parametrize(
    ("changes", "field", "ours", "theirs"),
    [
        ({"items_root": "x" * 64}, "items_root", MANIFEST.root, "xxx"),
        ({"encoder": {"model": "n", "preprocessing": {"crop": [4, 4]}}}, "encoder.model", "'m'", "'n'"),
        ({"encoder": {"model": "m", "preprocessing": {"crop": [4, 5]}}}, "encoder.preprocessing.crop", "4, 4", "4, 5"),
        ({"dtype": "float32"}, "dtype", "float16", "float32"),
        ({"batch_size": 8}, "batch_size", "4", "8"),
    ],
)
def test_another_fingerprint_names_the_field_and_changes_nothing(store: Path, changes, field, ours, theirs) -> None:
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    with pytest.raises(FingerprintMismatchError) as caught, opened(store, make_spec(**changes)):
        pass
    line = next(line for line in str(caught.value).splitlines() if line.strip().startswith(field + ":"))
    assert ours in line
    assert theirs in line
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_a_folder_or_file_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(UsageError, match=r"thesis\.tex"), opened(tmp_path):
        pass
    with pytest.raises(UsageError, match="got the file"), opened(tmp_path / "thesis.tex"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreNotFoundError, match="no store at"):
        EmbeddingStore(tmp_path)


def test_a_creation_that_was_killed_is_begun_again(store: Path) -> None:
    (store / "zarr.json").unlink()
    (store / "COMPLETE.json").unlink()
    with opened(store) as writer:
        writer.finish()
    assert len(EmbeddingStore(store)) == N


def test_an_altered_specification_is_noticed(store: Path) -> None:
    text = (store / "zarr.json").read_text()
    (store / "zarr.json").write_text(text.replace('"batch_size": 4', '"batch_size": 2'))
    with pytest.raises(IntegrityError, match="altered"):
        EmbeddingStore(store)


def test_a_store_of_another_format_is_refused(store: Path) -> None:
    text = (store / "zarr.json").read_text()
    (store / "zarr.json").write_text(text.replace('"format": 2', '"format": 3'))
    with pytest.raises(IntegrityError, match="format 3"):
        EmbeddingStore(store)


@pytest.mark.parametrize("key", ["../x", "/etc/x", ".x", "a/../b", "a b", "x" * 65, ""])
def test_object_names_cannot_leave_the_store(tmp_path: Path, key: str) -> None:
    from gstds_cache.store.local import LocalTransport

    with pytest.raises(UsageError, match="object name"):
        LocalTransport(tmp_path).put(key, b"")


def test_two_processes_never_write_at_once(store: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from gstds_cache.store.local import LocalTransport\n"
        "from gstds_cache.errors import IncompleteError\n"
        "try:\n    LocalTransport(Path(sys.argv[1])).lock().__enter__()\nexcept IncompleteError: sys.exit(44)"
    )
    with opened(store):
        assert FORKS.run(["-c", program, str(store)], cwd=store).returncode == 44
    assert FORKS.run(["-c", program, str(store)], cwd=store).returncode == 0


def test_summary_and_verify_of_a_whole_store(store: Path) -> None:
    summary = summarise(store)
    assert (summary.complete, summary.items, summary.dim, summary.committed, summary.model) == (True, N, D, 3, "m")
    json.dumps(summary.to_dict())
    report = verify(store, "full")
    assert (report.problems, report.complete) == ((), True)
    assert report.bytes_hashed == sum((store / layout.object_key(u)).stat().st_size for u in range(3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shard_s_object_has_the_bytes_that_zarr_writes(dtype) -> None:
    spec, rows = make_spec(dtype=dtype), make_rows().astype(dtype)
    stored: dict = {}
    array = zarr.create_array(
        store=zarr.storage.MemoryStore(stored), shape=rows.shape, chunks=(SHARD, D), dtype=dtype, fill_value=np.nan,
        filters=None, compressors=[zarr.codecs.Crc32cCodec()], config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = rows
    for shard in range(3):
        span = spec.rows_of(shard)
        part = rows[span.start : span.stop]
        data = layout.shard_object(spec, shard, part)
        assert bytes(data) == stored[f"c/{shard}/0"].to_bytes()
        assert layout.hashes_of(part, bytes(data[part.nbytes :])) == (sha256_hex(part.tobytes()), sha256_hex(data))
