"""Handing a store on to other tools, and removing it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import FORKS
from small_store import LABELS, MANIFEST, SHA256, D, N, fill, make_rows, opened

from gstds_cache.costs.records import store_costs
from gstds_cache.errors import ChunkCorruptError, IncompleteError, StoreNotFoundError, UsageError
from gstds_cache.files.derived import GUIDANCE, MIRROR, SELECTIONS, derived_paths, existing_derived
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.export import export_rows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.remove import remove_store

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_table_has_every_item_in_order_and_null_where_there_is_no_embedding(store, tmp_path, ending) -> None:
    file = tmp_path / f"rows{ending}"
    assert export_rows(EmbeddingStore(store), file) == file.stat().st_size
    table = pq.read_table(file) if ending == ".parquet" else pa.ipc.open_file(file).read_all()
    assert table["id"].to_pylist() == list(MANIFEST.ids)
    assert table["sha256"].to_pylist() == [row.tobytes() for row in SHA256]
    assert table["label"].to_pylist() == LABELS.tolist()
    assert table["valid"].to_pylist() == [1, 1, 1, 2] + [1] * 18
    embeddings = table["embedding"].to_pylist()
    assert [row for row in range(N) if embeddings[row] is None] == [3]
    assert [embeddings[row] for row in range(N) if row != 3] == [
        make_rows()[row].tolist() for row in range(N) if row != 3
    ]
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), D)


def test_an_npy_is_the_rows(store: Path, tmp_path: Path) -> None:
    export_rows(EmbeddingStore(store), tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), make_rows())


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".npy"])
def test_a_name_in_another_encoding_is_a_name(store: Path, command: Run, tmp_path: Path, ending: str) -> None:
    name = os.fsdecode(b"gr\xfc\xdfe" + ending.encode())
    done = command("gstds-cache", "export", "s", name, "--json")
    assert done.stdout.startswith("wrote gr\\udcfc\\udcdfe")
    plain = tmp_path / f"plain{ending}"
    export_rows(EmbeddingStore(store), plain)
    assert (tmp_path / name).read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"no\xff/rows.npy", "check the path"),
        (b"folder.npy", "is a folder"),
        (b"rows.\xff", "got the ending"),
        (b"x" * 300 + b".parquet", "check the path"),
    ],
)
def test_a_place_for_an_export_that_is_none(store: Path, command: Run, tmp_path: Path, name, words: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    done = command("gstds-cache", "export", "s", os.fsdecode(name), code=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "words"), [("rows.csv", r"\.npy, \.parquet, \.arrow"), ("there.npy", "replace=True")])
def test_what_cannot_be_written_is_said_before_anything_is(store, tmp_path, name, words) -> None:
    (tmp_path / "there.npy").write_bytes(b"mine")
    with pytest.raises(UsageError, match=words):
        export_rows(EmbeddingStore(store), tmp_path / name)
    assert (tmp_path / "there.npy").read_bytes() == b"mine"


def test_a_damaged_shard_is_not_exported_and_the_file_that_was_there_stays(store: Path, tmp_path: Path) -> None:
    path = store / layout.object_key(1)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    for name in ("rows.npy", "rows.parquet"):
        (tmp_path / name).write_bytes(b"before")
        with pytest.raises(ChunkCorruptError, match="shard 1"):
            export_rows(EmbeddingStore(store), tmp_path / name, replace=True)
        assert (tmp_path / name).read_bytes() == b"before"
    assert not list(tmp_path.glob(".*"))


def test_removing_takes_the_store_and_nothing_else(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    assert remove_store(store) == 15 - 1  # all but .lock, which is no object
    assert [path.name for path in store.iterdir()] == ["notes.txt"]
    with pytest.raises(StoreNotFoundError):
        remove_store(store)
    assert (store / "notes.txt").exists()


def test_removing_leaves_no_empty_directory(store: Path) -> None:
    remove_store(store)
    assert not store.exists()


def test_a_store_that_is_being_written_is_not_removed(store: Path) -> None:
    program = (
        "import sys; from gstds_cache.store.remove import remove_store\n"
        "from gstds_cache.errors import IncompleteError\n"
        "try:\n    remove_store(sys.argv[1])\nexcept IncompleteError: sys.exit(44)"
    )
    with opened(store):
        assert FORKS.run(["-c", program, str(store)], cwd=store.parent).returncode == 44
    assert len(EmbeddingStore(store)) == N
    assert issubclass(IncompleteError, RuntimeError)


@pytest.mark.parametrize("spelling", ["{}", "./s", "file://{}", "FILE://{}", "s3", "S3"])
def test_removing_takes_what_was_derived_however_the_store_is_named(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from click.testing import CliRunner
    from gstds_cache.cli.cache_command import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    where = spelling.format(tmp_path / "s")
    if spelling.lower() == "s3":
        where = spelling + request.getfixturevalue("s3_prefix").removeprefix("s3")
    fill(where)
    store = EmbeddingStore(where)
    paths = [path for suffix in (SELECTIONS, GUIDANCE, MIRROR) for path in derived_paths(store.location, suffix)]
    for path in paths:
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"1")
    for path in store_costs(store):
        path.write_text("{}")
        paths.append(path)
    assert len(paths) == (4 if spelling.lower() == "s3" else 8)
    assert sorted(existing_derived(Location.parse(store))) == sorted(paths)
    done = CliRunner().invoke(main, ["rm", where, "--yes"])
    assert done.exit_code == 0, done.output
    assert not any(path.exists() for path in paths)
    assert {path.name for path in tmp_path.iterdir() if any(path.rglob("*"))} <= {"cache"}
    with pytest.raises(StoreNotFoundError):
        EmbeddingStore(where)
