"""Names in mapped Arrow arrays: the same as a tuple of strings, without its memory."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gstds_cache.data import folder as folder_module
from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data import manifest as manifest_module
from gstds_cache.data import names as names_module
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.names import AT_ONCE, Names, duplicate
from gstds_cache.data.sources import open_source
from gstds_cache.files import mapped
from gstds_cache.store import layout
from gstds_cache.store.spec import CacheSpec

MANY = 2 * AT_ONCE + 3
file_names = st.binary(max_size=6).map(os.fsdecode) | st.text("a/\u00e9.", max_size=5)


def names_of(count: int) -> Iterator[str]:
    return (f"class{row % 16:02d}/{row:08d}.png" for row in range(count))


@given(st.lists(file_names, max_size=8))
def test_they_are_the_strings_they_were_made_of(strings: list[str]) -> None:
    names = Names.of(strings)
    assert names == strings
    assert names == tuple(strings)
    assert (names == [*strings, "one more"]) is False
    assert list(names) == strings
    assert [names[row] for row in range(-len(strings), len(strings))] == strings + strings
    assert [names[slice(*cut)] for cut in ((1, 4), (None, None, -1), (5, 2), (0, 99, 2))] == [
        tuple(strings[slice(*cut)]) for cut in ((1, 4), (None, None, -1), (5, 2), (0, 99, 2))
    ]
    assert names.encoded(1, 3) == [os.fsencode(name) for name in strings[1:3]]
    assert pickle.loads(pickle.dumps(names)) == names == Names.of(strings)
    assert Names.of([*strings, "x"]) != names
    assert (duplicate(names) is None) == (len(set(strings)) == len(strings))
    with pytest.raises(IndexError):
        names[len(strings)]


def test_many_are_mapped_and_equal_to_the_tuple() -> None:
    strings = tuple(names_of(MANY))
    names = Names.of(iter(strings))
    assert names == strings
    assert tuple(names) == strings
    assert names[AT_ONCE - 2 : AT_ONCE + 2] == strings[AT_ONCE - 2 : AT_ONCE + 2]
    changed = [*strings]
    changed[-1] = changed[-1][::-1]
    assert names != changed
    assert names != Names.of(changed)
    assert duplicate(names) is None
    assert duplicate(Names.of([*strings, strings[5]])) == strings[5]
    assert names.encoded(MANY - 2, MANY + 9) == [strings[-2].encode(), strings[-1].encode()]
    assert [len(array) for array in names.arrays(AT_ONCE - 2, AT_ONCE + 2)] == [2, 2]
    assert pa.concat_arrays(names.arrays(5, MANY)).to_pylist() == names.encoded(5, MANY)


@pytest.mark.parametrize(
    "lengths", [[], [0], [3], [AT_ONCE], [AT_ONCE, 3], [5, AT_ONCE, 0, AT_ONCE - 7, AT_ONCE + 1, 2]]
)
def test_arrays_of_any_lengths_become_names(lengths: list[int]) -> None:
    strings = tuple(names_of(sum(lengths)))
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    whole = pa.array([name.encode() for name in strings], pa.binary())
    names = Names.of_arrays(whole.slice(end - length, length) for end, length in zip(ends, lengths, strict=True))
    assert names == strings
    assert names == Names.of(strings)
    assert {len(array) for array in [*names.arrays(0, len(names))][:-1]} <= {AT_ONCE}
    assert [names[row] for row in (0, -1) if strings] == [strings[row] for row in (0, -1) if strings]


def test_names_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "_hashes", lambda names, start: np.zeros(len(names) - start, np.uint64))
    assert duplicate(Names.of(["a", "b", "c"])) is None
    assert duplicate(Names.of(["a", "b", "a"])) == "a"


def test_row_numbers_and_names_that_are_no_text() -> None:
    assert Names.numbered(2) == ("0000000", "0000001")
    assert Names.of(names := Names.of(["a"])) is names
    with pytest.raises(UnicodeEncodeError):
        Names.of(["\udc80"], "strict")


def test_a_folder_is_sorted_in_parts_as_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/9.png", "a/10.png", "a/b/1.png", "a/b.png", "a/b-c/2.png", "a-/3.png", "a.d/4.png", "a/\xe9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    whole = open_source(f"imagefolder:{tmp_path}")
    assert list(whole.ids) == sorted(whole.ids, key=str.encode)
    assert [whole.classes[label] for label in whole.labels] == [name.partition("/")[0] for name in whole.ids]
    for size in (1, 2, 3):
        monkeypatch.setattr(folder_module, "_AT_ONCE", size)
        parts = open_source(f"imagefolder:{tmp_path}")
        assert (parts.ids, parts.labels.tolist()) == (whole.ids, whole.labels.tolist())


def test_memory_does_not_grow_with_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that Python and NumPy hold at once, from the names to the objects of the store."""
    # What is in memory at a time is made small, or this would need a million items.
    monkeypatch.setattr(mapped, "SMALL", 1)
    for module, name in (
        (names_module, "AT_ONCE"),
        (manifest_module, "AT_ONCE"),
        (manifest_module, "_RECORDS"),
        (hash_cache_module, "_ROWS"),
        (layout, "_ROWS"),
    ):
        monkeypatch.setattr(module, name, 256)

    def peak(rows: int) -> int:
        pool = pa.proxy_memory_pool(pa.system_memory_pool())
        pa.set_memory_pool(pool)
        tracemalloc.start()
        names = Names.of(names_of(rows))
        files = Files("/nowhere/", names)
        hash_cache = HashCache(tmp_path / str(rows))
        signatures, digests = hash_cache.recall(files)
        hash_cache.record(files, signatures, digests, np.ones(rows, bool))
        part = Files("/nowhere/", Names.of(names[row] for row in range(0, rows, 2)))
        assert HashCache(tmp_path / str(rows)).recall(part)[0].shape == (rows // 2, 4)
        labels = np.broadcast_to(np.int64(3), (rows,))
        manifest = DatasetManifest("imagefolder", names, digests, labels)
        spec = CacheSpec(
            items=rows, items_root=manifest.root, encoder={}, dim=1, dtype="float16", batch_size=1, shard_rows=1
        )
        layout.metadata_objects(spec, {}, labels)
        assert DatasetManifest.from_arrow(manifest.to_arrow()).root == manifest.root
        most = tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
        tracemalloc.stop()
        return most

    before = pa.default_memory_pool()
    peak(10)  # What is imported and cached on the way.
    few, many = peak(5_000), peak(11_000)
    assert many - few < 20 * 6_000  # Of lists and arrays it would be 300 an item; what else a process does is noise.
    pa.set_memory_pool(before)
