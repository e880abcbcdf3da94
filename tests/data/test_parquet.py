"""Parquet and Arrow files written by pyarrow: columns, damage, and how much is read for a row."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_kinds import Item, items, table

from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data import parquet as parquet_module
from gstds_cache.data import table_files
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import FileSource
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.data.table import TableSource
from gstds_cache.errors import DatasetError, UsageError

COUNT = 20


@pytest.fixture(scope="session")
def twenty() -> list[Item]:
    return items(COUNT)


def written(folder: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), folder / "t.parquet", **options)
    return f"parquet:{folder / 't.parquet'}"


def payloads(source: TableSource) -> list[bytes]:
    return [source.payload(row) for row in range(len(source))]


def test_paths_are_files_beside_the_table(tmp_path: Path, twenty) -> None:
    (tmp_path / "images").mkdir()
    for row, item in enumerate(twenty):
        (tmp_path / "images" / f"{row}.png").write_bytes(item.data)
    uri = written(tmp_path, {"file_name": [f"images/{row}.png" for row in range(COUNT)], "n": range(COUNT)})
    source = open_source(uri)
    assert isinstance(source, FileSource)
    assert source.payload(7) == twenty[7].data
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    mixed = [
        {"bytes": None, "path": f"images/{row}.png"} if row % 2 else {"bytes": item.data, "path": None}
        for row, item in enumerate(twenty)
    ]
    source = open_source(written(tmp_path, {"image": pa.array([*mixed, None], kind)}))
    assert payloads(source) == [*(item.data for item in twenty), b""]
    assert source.containers == ()  # a change of a file beside the table would not be seen
    with pytest.raises(UndecodableError) as caught:
        source.image(COUNT)
    assert caught.value.reason == "no image: the cell is empty"


def test_ids_of_rows_of_files_and_of_a_column(tmp_path: Path, twenty) -> None:
    whole = table(twenty).append_column("key", pa.array([f"k{row}" for row in range(COUNT)]))
    (tmp_path / "sub").mkdir()
    pq.write_table(whole.slice(0, 12), tmp_path / "sub" / "a.parquet")
    pq.write_table(whole.slice(12), tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}")
    assert (source.ids[0], source.ids[8]) == ("b/0000000", "sub/a/0000000")
    assert open_source(f"parquet:{tmp_path}/b.parquet").ids[7] == "0000007"
    assert open_source(f"parquet:{tmp_path}/*.parquet?id=key").ids[0] == "k12"
    with pytest.raises(DatasetError, match="got the id 'x' in rows 0 and 1 of column 'caption'"):
        open_source(f"parquet:{tmp_path}/b.parquet?id=caption")
    pq.write_table(whole.drop_columns(["label"]), tmp_path / "sub" / "a.parquet")
    with pytest.raises(DatasetError, match=r"got no such column for the column 'label' of .*a\.parquet"):
        open_source(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (pa.array([3, None, 0]), [3, -1, 0], ()),
        (pa.array([1.0, 2.0, float("nan")]), [1, 2, -1], ()),
        (pa.array(["b", "a", None]).dictionary_encode(), [1, 0, -1], ("a", "b")),
        (pa.array([True, False, True]), [1, 0, 1], ()),
    ],
    ids=["int", "float", "dictionary", "bool"],
)
def test_labels(tmp_path: Path, twenty, values, labels, classes) -> None:
    source = open_source(written(tmp_path, {"image": [item.data for item in twenty[:3]], "label": values}))
    assert (source.labels.tolist(), source.classes) == (labels, classes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0, 2.0], "column 'label', item '0000000' (row 0): got the label 0.5 (float), expected a whole number"),
        ([[0, 1], [1, 0], [1, 1]], "got the label [0, 1] (list)"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, twenty, values, message) -> None:
    with pytest.raises(DatasetError) as caught:
        open_source(written(tmp_path, {"image": [item.data for item in twenty[:3]], "label": values}))
    assert message in caught.value.message


def test_columns_are_found_named_or_asked_for(tmp_path: Path, twenty) -> None:
    data = [item.data for item in twenty]
    source = open_source(written(tmp_path, {"data": data, "width": range(COUNT)}))
    assert source.labels.tolist() == [-1] * COUNT
    assert source.notes == (
        "labels: no column is named label, labels, class or alike; name one by label=COLUMN, of: width",
    )
    assert open_source(f"parquet:{tmp_path / 't.parquet'}?label=").notes == ()
    uri = written(tmp_path, {"left": data, "right": data, "label": range(COUNT)})
    with pytest.raises(DatasetError, match=r"got 2 columns that may hold images, of left \(binary\), right") as caught:
        open_source(uri)
    assert caught.value.hint == "say which it is: image=COLUMN"
    for query, message in (
        ("image=rihgt", "did you mean 'right'?"),
        ("image=left&label=lable", "did you mean 'label'?"),
    ):
        with pytest.raises(UsageError) as caught:
            open_source(f"{uri}?{query}")
        assert caught.value.hint == message
    with pytest.raises(DatasetError, match="got the column 'label' of int64, expected bytes of image files"):
        open_source(f"{uri}?image=label")
    with pytest.raises(DatasetError, match="got no column that may hold images, of n"):
        open_source(written(tmp_path, {"n": [1]}))
    with pytest.raises(DatasetError, match="got 0 rows"):
        open_source(written(tmp_path, {"image": pa.array([], pa.binary())}))


def test_a_group_of_rows_is_read_once_and_few_are_kept(tmp_path: Path, twenty, monkeypatch) -> None:
    uri = written(tmp_path, {"image": [item.data for item in twenty]}, row_group_size=5)
    groups: list[int] = []
    group = table_files.ParquetFile.group

    def counted(self, number: int, columns: Any) -> Any:
        groups.append(number)
        return group(self, number, columns)

    monkeypatch.setattr(table_files.ParquetFile, "group", counted)
    source = open_source(uri)
    assert payloads(source) == [item.data for item in twenty]
    assert groups == [0, 1, 2, 3]
    monkeypatch.setattr(parquet_module, "KEPT", 1)
    small = source.for_workers()()
    for row in (0, 1, 6, 0):
        small.payload(row)
    assert groups[4:] == [0, 1, 0]


def test_a_large_group_of_rows_takes_no_memory(tmp_path: Path, twenty, monkeypatch) -> None:
    monkeypatch.setattr(parquet_module, "LARGE", 100)

    def whole(*_: object) -> None:
        pytest.fail("all of it was read at once")

    monkeypatch.setattr(table_files.ParquetFile, "group", whole)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": item.data, "path": None} for item in twenty]
    images[3], images[4] = None, {"bytes": None, "path": "4.png"}
    (tmp_path / "4.png").write_bytes(twenty[4].data)
    source = open_source(written(tmp_path, {"image": pa.array(images, kind)}))
    assert payloads(source) == [b"" if row == 3 else item.data for row, item in enumerate(twenty)]
    assert "each is unpacked to a temporary file" in source.notes[-1]


def test_threads_may_share_it(tmp_path: Path, twenty) -> None:
    source = open_source(written(tmp_path, {"image": [item.data for item in twenty]}, row_group_size=3))
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(COUNT)
        wrong.extend(row for row in order.tolist() * 5 if source.payload(row) != twenty[row].data)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_damage(tmp_path: Path, twenty) -> None:
    uri = written(tmp_path, {"image": [item.data for item in twenty]}, row_group_size=5, use_dictionary=False)
    path = tmp_path / "t.parquet"
    whole = path.read_bytes()
    source = open_source(uri)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="changed since it was opened"):
        source.payload(0)
    with pytest.raises(DatasetError, match=r"t\.parquet cannot be read: Arrow") as caught:
        open_source(uri)
    assert "cut short" in caught.value.hint
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="begins with an empty file, expected a Parquet or Arrow IPC file"):
        open_source(uri)
    start = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + bytes(60) + whole[start + 60 :])
    source = open_source(uri)
    assert source.payload(0) == twenty[0].data
    with pytest.raises(UndecodableError) as spoiled:
        source.image(5)
    assert spoiled.value.reason == "unreadable: a group of rows in t.parquet is damaged"


def test_a_link_to_a_folder_above_repeats_no_row(tmp_path: Path, twenty) -> None:
    (tmp_path / "sub").mkdir()
    pq.write_table(table(twenty).slice(0, 2), tmp_path / "sub" / "a.parquet")
    pq.write_table(table(twenty).slice(2, 3), tmp_path / "t.parquet")
    plain = list(open_source(f"parquet:{tmp_path}").ids)
    (tmp_path / "sub" / "loop").symlink_to("..")
    assert list(open_source(f"parquet:{tmp_path}").ids) == plain
    assert len(plain) == 5


def test_a_file_that_is_replaced_after_it_was_opened_vouches_for_nothing(tmp_path: Path, twenty, monkeypatch) -> None:
    monkeypatch.setattr(hash_cache_module, "RACY_NS", 0)
    uri = written(tmp_path, {"image": [item.data for item in twenty[:2]]})
    source = open_source(uri)
    assert source.payload(0) == twenty[0].data  # from here on the file is open
    pq.write_table(pa.table({"image": [item.data for item in twenty[2:4]]}), tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "t.parquet")
    build_manifest(source, hash_cache=HashCache(tmp_path / "hashes"))
    digests = build_manifest(open_source(uri), hash_cache=HashCache(tmp_path / "hashes")).sha256
    assert [row.tobytes() for row in digests] == [hashlib.sha256(item.data).digest() for item in twenty[2:4]]


def test_nothing_there(tmp_path: Path) -> None:
    for uri, message in (
        (f"parquet:{tmp_path}/no*.parquet", "got nothing there"),
        (f"parquet:{tmp_path}", "got a folder without a Parquet or Arrow file"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_source(uri)
    with pytest.raises(UsageError, match="no path given"):
        open_source("parquet:")


def test_a_compressed_stream_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table_files, "LARGE", 1)
    images = pa.table({"image": [bytes(50_000) for _ in range(4)]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(tmp_path / "s.arrow", images.schema, options=options) as writer:
        writer.write_table(images)
    with pytest.raises(DatasetError, match="got a compressed Arrow stream"):
        open_source(f"arrow:{tmp_path / 's.arrow'}")
