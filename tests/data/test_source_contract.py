"""What every kind of data set promises; a new kind adds itself to tests/shared/source_kinds.py."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_driver import Steps, Stopped
from PIL import Image
from real_store import embed, objects_of
from source_kinds import CLASSES, KINDS, Item, Kind, items

from gstds_cache.data import hash_cache as hash_cache_module
from gstds_cache.data.decode import UndecodableError, decode_image
from gstds_cache.data.files import Files
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.loading import pixel_batches
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.data.subset import Subset
from gstds_cache.errors import IntegrityError
from gstds_cache.files import mapped

COUNT, BROKEN = 24, 9
ON_DISK = [name for name, kind in KINDS.items() if kind.on_disk]
"""Of the others no hash can be kept, and their memory is the user's own."""


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen = KINDS[request.param]
    if chosen.missing:
        pytest.skip(f"{chosen.needs} is not installed")
    if chosen.in_bucket:
        request.getfixturevalue("s3_prefix")
    return chosen


@pytest.fixture(scope="session")
def made() -> list[Item]:
    return items(COUNT, broken=[BROKEN])


@pytest.fixture
def named(kind: Kind, made: list[Item], tmp_path: Path) -> Any:
    (tmp_path / "data").mkdir()
    return kind.write(tmp_path / "data", made)


@pytest.fixture
def source(named: Any) -> ImageSource:
    return open_source(named)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8))).transpose(2, 0, 1).copy())


def test_items_in_their_order_with_ids_labels_and_classes(kind, made, named, source) -> None:
    again = open_source(named)
    assert isinstance(source, ImageSource)
    assert len(source) == len(source.ids) == len(set(source.ids)) == COUNT
    assert list(again.ids) == list(source.ids)
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [item.label if kind.labelled else -1 for item in made]
    assert tuple(source.classes) == (CLASSES if kind.labelled and kind.named else ())
    assert not isinstance(named, str) or source.uri == named
    assert "/" not in source.kind
    for row in (0, COUNT - 1):
        assert source.image(row).mode == "RGB"
        assert source.image(row).tobytes() == decode_image(made[row].data).tobytes()


def test_hashes_are_of_the_image_files_bytes(kind, made, named, source) -> None:
    manifest = build_manifest(source)
    assert manifest.root == build_manifest(open_source(named)).root
    if kind.encoded:
        assert [row.tobytes() for row in manifest.sha256] == [hashlib.sha256(item.data).digest() for item in made]
        assert [source.payload(row) for row in range(COUNT)] == [item.data for item in made]


def test_a_broken_image_is_an_item_with_a_reason(source, tmp_path) -> None:
    with pytest.raises(UndecodableError) as caught:
        source.image(BROKEN)
    assert caught.value.reason
    assert str(tmp_path) not in caught.value.reason
    report = embed(tmp_path / "store", source)
    assert (report.embedded, report.ok) == (COUNT, COUNT - 1)
    assert [entry.row for entry in report.quarantined] == [BROKEN]
    assert report.quarantined[0].reason == caught.value.reason


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust a signature at once: it would have to be two seconds old."""
    monkeypatch.setattr(hash_cache_module, "RACY_NS", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ImageSource], list[int]]]:
    """Given a source, the rows that are read from then on."""
    rows: list[int] = []

    def watch(source: ImageSource) -> list[int]:
        rows.clear()
        payload, sha256 = type(source).payload, Files.sha256

        def counted_payload(self: Any, row: int) -> bytes:
            rows.append(row)
            return payload(self, row)

        def counted_sha256(self: Files, row: int) -> bytes:
            rows.append(row)
            return sha256(self, row)

        monkeypatch.setattr(type(source), "payload", counted_payload)
        monkeypatch.setattr(Files, "sha256", counted_sha256)
        return rows

    return watch


@pytest.mark.parametrize("kind", ON_DISK, indirect=True)
@pytest.mark.usefixtures("_no_waiting")
def test_a_second_run_opens_no_image(named, tmp_path, read) -> None:
    first = build_manifest(open_source(named), hash_cache=HashCache(tmp_path / "hashes"))
    source = open_source(named)
    rows = read(source)
    again = build_manifest(source, hash_cache=HashCache(tmp_path / "hashes"))
    assert again.root == first.root
    assert rows == []


@pytest.mark.parametrize("kind", ON_DISK, indirect=True)
@pytest.mark.usefixtures("_no_waiting")
def test_what_changed_is_read_again(kind, made, named, tmp_path) -> None:
    cache = tmp_path / "hashes"
    first = build_manifest(open_source(named), hash_cache=HashCache(cache))
    other = [*made[:5], Item(made[6].data, made[5].label), *made[6:]]
    for path in sorted((tmp_path / "data").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    again = build_manifest(open_source(kind.write(tmp_path / "data", other)), hash_cache=HashCache(cache))
    assert np.flatnonzero((again.sha256 != first.sha256).any(axis=1)).tolist() == [5]


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.encoded], indirect=True)
def test_an_item_that_is_another_than_the_one_that_was_hashed_is_refused(source, made) -> None:
    digests = build_manifest(source).sha256.copy()
    digests[5] = digests[6]
    digests[7] = 0  # could not be read then
    rows = np.array([8, 7, 6, 5])
    names = [source.ids[row] for row in rows.tolist()]
    part = Subset(base=source, uri="part", rows=rows, ids=names, labels=source.labels[rows])
    for read, other, unread, good in ((as_hashed(source, digests), 5, 7, 6), (as_hashed(part, digests[rows]), 3, 1, 2)):
        for again in (read, pickle.loads(pickle.dumps(read))):
            for reading in (again.payload, again.image):
                with pytest.raises(IntegrityError, match=r"item .* changed since it was hashed: got SHA-256"):
                    reading(other)
                with pytest.raises(IntegrityError, match=r"could not be read when it was hashed, and can be now"):
                    reading(unread)
            assert again.image(good).mode == "RGB"
    assert as_hashed(source, None).payload(7) == made[7].data
    assert source.payload(5) == made[5].data


def test_it_pickles_and_processes_that_decode_see_the_same(source, made) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.uri, list(copy.ids), copy.labels.tolist()) == (source.uri, list(source.ids), source.labels.tolist())
    assert copy.image(3).tobytes() == source.image(3).tobytes()
    source.image(2)  # what is open here is not to be shared
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    batches = pixel_batches(source, pixels, (3, 8, 8), [order[:16], order[16:]], workers=2, pin=False)
    assert batches.workers == 2
    decoded = torch.cat([batch.pixels for batch in batches])
    batches.close()
    for place, row in enumerate(order):
        expected = torch.zeros(3, 8, 8, dtype=torch.uint8) if row == BROKEN else pixels(decode_image(made[row].data))
        assert torch.equal(decoded[place], expected), row


def test_stopped_and_begun_again_it_is_the_same_store(named, tmp_path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with Steps(str(whole), None, "stop").counted() as steps:
        embed(whole, open_source(named))
    commits = [number for number, label in enumerate(steps.labels) if label.startswith("after link commits/")]
    with pytest.raises(Stopped), Steps(str(stopped), commits[1], "stop").counted():
        embed(stopped, open_source(named))
    report = embed(stopped, open_source(named))
    assert 0 < report.committed_before < COUNT
    assert objects_of(stopped) == objects_of(whole)


# Of a bucket the threads that read ahead would be counted, as many as there is to read, up to their limit.
@pytest.mark.parametrize("kind", [name for name in ON_DISK if not KINDS[name].in_bucket], indirect=True)
def test_no_object_is_kept_for_an_item(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)
    one = io.BytesIO()
    Image.new("L", (1, 1)).save(one, "PNG")
    kept = []
    for count in (60, 100, 600):  # the first time what is imported counts as well
        (tmp_path / str(count)).mkdir()
        written = kind.write(tmp_path / str(count), [Item(one.getvalue(), row * 3 // count) for row in range(count)])
        before = sys.getallocatedblocks()
        source = open_source(written)
        manifest = build_manifest(source)
        assert len(manifest) == count
        kept.append(sys.getallocatedblocks() - before)
        del source, manifest
    # A Python object a row would be 500 blocks more; of the groups of six rows some are kept, with three blocks each.
    assert kept[2] - kept[1] < 400
