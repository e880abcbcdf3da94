"""Files below one folder, and their digests."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.data import files as files_module
from gstds_cache.data.files import Files


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
