"""Files below one folder, and their digests."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.data import files as files_module
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.files import Files
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.sizes import sample_sizes
from gstds_cache.data.sources import open_source
from gstds_cache.data.table import TableSource
from gstds_cache.errors import IntegrityError


@given(st.lists(st.text(st.sampled_from("a/b."), max_size=6), max_size=5))
def test_files_at_paths(paths: list[str]) -> None:
    files = Files.at(paths)
    assert [files.path(row) for row in range(len(files))] == paths
    assert files.folder == "" or files.folder.endswith("/")
    assert all(path.startswith(files.folder) for path in paths)
    assert [files.part([row]).path(0) for row in range(len(files))] == paths
    assert pickle.loads(pickle.dumps(files)) == files


def test_a_large_file_is_hashed_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(5).randbytes(1 << 20)
    (tmp_path / "large").write_bytes(data)
    monkeypatch.setattr(files_module, "_AT_ONCE", 1000)
    assert Files.at([str(tmp_path / "large")]).sha256(0) == hashlib.sha256(data).digest()


@pytest.mark.parametrize("kind", ["pipe", "link to /dev/zero"])
def test_what_has_no_end_is_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    (tmp_path / "list.csv").write_text("path,label\na.png,1\n")
    source = open_source(f"list:{tmp_path / 'list.csv'}")
    assert source.files is not None
    for read in (source.payload, source.files.sha256):
        with pytest.raises(OSError, match="no regular file"):
            read(0)
    with pytest.raises(UndecodableError) as caught:
        source.image(0)
    assert caught.value.reason == "unreadable: no regular file"
    assert sample_sizes(source).shorter == ()


class OnePath:
    """A column of a table with one path in it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __len__(self) -> int:
        return 1

    def cell(self, _row: int) -> str:
        return self.path

    def reopened(self) -> OnePath:
        return self


def test_a_path_in_a_table_leads_to_no_pipe_and_to_no_huge_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", files_module.MAX_BYTES + 1)
    for name, reason in (
        ("pipe", "unreadable: no regular file"),
        ("huge", "too large a file: 1073741825 bytes, at most 1073741824 are decoded"),
    ):
        cells = OnePath(tmp_path / name)
        source = TableSource(uri="x", kind="parquet", ids=["0"], labels=np.array([-1]), cells=cells)
        with pytest.raises(UndecodableError) as caught:
            source.image(0)
        assert caught.value.reason == reason
        with pytest.raises(OSError, match=r"no regular file|too large a file"):
            source.payload(0)


def test_a_path_in_a_table_leads_to_no_file_that_grew_since_it_was_hashed(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", files_module.MAX_BYTES + 1)
    source = TableSource(uri="x", kind="parquet", ids=["0"], labels=np.array([-1]), cells=OnePath(tmp_path / "huge"))
    compared = as_hashed(source, np.ones((1, 32), np.uint8))
    for reading in (compared.image, compared.payload):
        with pytest.raises(IntegrityError, match=r"item 0 \(row 0\) changed since it was hashed: got 1073741825 bytes"):
            reading(0)
    with pytest.raises(UndecodableError, match="too large"):  # as it was then
        as_hashed(source, np.zeros((1, 32), np.uint8)).image(0)
