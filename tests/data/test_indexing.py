"""Tar shards that are indexed by an executor: what one process finds, and what it says of a machine that sees less."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.indexing import SPREAD_FROM
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError


class Elsewhere:
    """An executor whose units come and go as bytes, as between processes; some of its machines see nothing."""

    def __init__(self, blind: tuple[int, ...] = ()) -> None:
        self.blind, self.units = blind, list[int]()

    def run(self, task: Any, units: Iterable[int], *, ordered: bool = False) -> Iterator[Any]:
        assert ordered
        work = pickle.loads(pickle.dumps(task.recipe())).open()
        for unit in units:
            self.units.append(unit)
            (result,) = work([unit])
            yield task.receive(pickle.loads(pickle.dumps((None, "node7") if unit in self.blind else result)))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(SPREAD_FROM + 1):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for row in range(3):
                file = io.BytesIO()
                Image.new("L", (2, 2), shard).save(file, "PNG")
                for name, data in ((f"{shard}-{row}.png", file.getvalue()), (f"{shard}-{row}.cls", b"%d" % row)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path


def test_it_finds_what_this_process_does(shards: Path, tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    got = open_source(f"webdataset:{shards}/*.tar", executor=elsewhere)  # type: ignore[arg-type]
    want = open_source(f"webdataset:{shards}/*.tar")
    assert list(got.ids) == list(want.ids)
    assert got.labels.tolist() == want.labels.tolist() == [0, 1, 2] * (SPREAD_FROM + 1)
    assert [got.payload(row) for row in range(len(got))] == [want.payload(row) for row in range(len(want))]
    assert elsewhere.units == list(range(SPREAD_FROM + 1))


def test_few_shards_and_known_ones_are_not_given_away(shards: Path, tmp_path: Path) -> None:
    (shards / "0.tar").unlink()
    elsewhere, cache = Elsewhere(), HashCache(tmp_path / "hashes")
    open_source(f"webdataset:{shards}/[12].tar", executor=elsewhere)  # type: ignore[arg-type]
    assert elsewhere.units == []
    open_source(f"webdataset:{shards}/*.tar", hash_cache=cache, executor=elsewhere)  # type: ignore[arg-type]
    assert len(elsewhere.units) == SPREAD_FROM


def test_a_machine_that_does_not_see_a_shard_is_named(shards: Path) -> None:
    with pytest.raises(DatasetError, match=r"shard .*3\.tar can be read here, and not on node7\n.*every machine has"):
        open_source(f"webdataset:{shards}/*.tar", executor=Elsewhere((3,)))  # type: ignore[arg-type]


def test_a_damaged_shard_has_the_error_of_this_process(shards: Path) -> None:
    (shards / "5.tar").write_bytes((shards / "5.tar").read_bytes()[:700])
    words = []
    for executor in (None, Elsewhere()):
        with pytest.raises(DatasetError) as caught:
            open_source(f"webdataset:{shards}/*.tar", executor=executor)  # type: ignore[arg-type]
        words.append(str(caught.value))
    assert words[0] == words[1]
