"""Data sets in a bucket: listed once, read ahead, and what a bad network and a change meanwhile do."""

from __future__ import annotations

import hashlib
import io
import math
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3_api import BUCKET, FaultProxy, upload

from gstds_cache.data.ahead import ReadAhead
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError, IncompleteError, IntegrityError, StoreUnavailableError, UsageError
from gstds_cache.files import bucket as bucket_module
from gstds_cache.files.bucket import Bucket
from gstds_cache.files.fetch import AT_ONCE, Part, ProcessFetcher, ThreadFetcher
from gstds_cache.files.location import Location


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()


NAMES = ["b/1.png", "a-b/1.png", "a/ü +%20#.png", "a/deep/er/2.png", "a/1.PNG", "b/.hidden.png", "stray.png", "a/x.txt"]


@pytest.fixture
def place(faulty_s3: tuple[str, FaultProxy]) -> tuple[str, FaultProxy]:
    where, proxy = faulty_s3
    return where.removeprefix(f"s3://{BUCKET}/"), proxy


def put(prefix: str, folder: Path, names: list[str] = NAMES) -> str:
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(shade))
        upload(f"{prefix}/{name}", png(shade))
    return f"imagefolder:s3://{BUCKET}/{prefix}"


def test_class_folders_are_the_same_data_set_as_on_disk(place, tmp_path) -> None:
    uri = put(place[0], tmp_path / "photos")
    there, here = open_source(uri), open_source(f"imagefolder:{tmp_path / 'photos'}")
    assert list(there.ids) == list(here.ids)
    assert (there.labels.tolist(), there.classes, there.kind) == (here.labels.tolist(), here.classes, here.kind)
    assert build_manifest(there).root == build_manifest(here).root
    assert there.image(1).tobytes() == here.image(1).tobytes()
    assert there.notes[:2] == (
        "ignored 1 image outside any class folder",
        "ignored 1 objects without an image extension (.txt)",
    )
    part = open_source(f"{uri}?split=train&holdout=0.5")
    assert part.payload(0) == there.payload(list(there.ids).index(part.ids[0]))


def test_a_second_run_lists_and_reads_no_object(place, tmp_path) -> None:
    prefix, proxy = place
    uri, cache = put(prefix, tmp_path / "photos"), tmp_path / "hashes"
    first = build_manifest(open_source(uri), hash_cache=HashCache(cache))
    read = proxy.count("GET", ".png") + proxy.count("GET", ".PNG")
    assert read == 5
    assert build_manifest(open_source(uri), hash_cache=HashCache(cache)).root == first.root
    assert proxy.count("GET", ".png") + proxy.count("GET", ".PNG") == read
    upload(f"{prefix}/b/1.png", png(99))
    hash_cache = HashCache(cache)
    again = build_manifest(open_source(f"{uri}?split=train&holdout=0.01", hash_cache=hash_cache), hash_cache=hash_cache)
    assert proxy.count("GET", ".png") + proxy.count("GET", ".PNG") == read + 1
    assert again.root != first.root


def test_several_requests_are_under_way_at_once(place, tmp_path) -> None:
    prefix, proxy = place
    source = open_source(put(prefix, tmp_path, [f"a/{number}.png" for number in range(8)]))
    fault = proxy.inject("delay", method="GET", key=".png", times=8, seconds=0.5)
    begun = time.monotonic()
    source.expect(range(8))  # type: ignore[attr-defined]
    assert [source.payload(row) for row in range(8)] == [png(row) for row in range(8)]
    assert fault.hits == 8
    assert time.monotonic() - begun < 8 * 0.5


def test_an_object_that_changed_or_went_away(place, tmp_path) -> None:
    prefix, _ = place
    source = open_source(put(prefix, tmp_path, ["a/0.png", "a/1.png"]))
    upload(f"{prefix}/a/1.png", png(77))
    for read in (source.payload, source.image):
        with pytest.raises(IntegrityError, match=r"object s3://.*/a/1\.png: changed since it was listed"):
            read(1)
    assert source.payload(0) == png(0)


def test_an_object_that_comes_short(place, tmp_path, monkeypatch) -> None:
    source = open_source(put(place[0], tmp_path, ["a/0.png"]))
    monkeypatch.setattr(ReadAhead, "take", lambda _self, _row: png(0)[:-1])
    for read in (source.payload, source.image):
        with pytest.raises(IntegrityError, match=r"object s3://.*/a/0\.png: changed since it was listed"):
            read(0)


def test_objects_that_cannot_be_read_leave_room_to_read_ahead(monkeypatch) -> None:
    asked: list[str] = []

    def submit(_self: ReadAhead, part: Part) -> Future[bytes]:
        asked.append(part.path)
        answer: Future[bytes] = Future()
        if int(part.path) < 40:
            answer.set_exception(FileNotFoundError(part.path))
        else:
            answer.set_result(b"x")
        return answer

    monkeypatch.setattr(ReadAhead, "_submit", submit)
    reading = ReadAhead(Bucket(Location(None, BUCKET), "data sets"), lambda row: Part(str(row), 0, 1))
    reading.expect(range(100))
    for row in range(40):
        with pytest.raises(FileNotFoundError):
            reading.take(row)
    assert reading.take(40) == b"x"
    assert asked == [str(row) for row in range(41 + AT_ONCE)]


def test_places_without_images(place, tmp_path) -> None:
    prefix, _ = place
    with pytest.raises(DatasetError, match="got no image and no class folder"):
        open_source(f"imagefolder:s3://{BUCKET}/{prefix}")
    put(prefix, tmp_path, ["stray.png"])
    with pytest.raises(DatasetError, match="got 1 images right there"):
        open_source(f"imagefolder:s3://{BUCKET}/{prefix}")
    with pytest.raises(UsageError, match="expected s3://bucket/prefix"):
        open_source("imagefolder:s3://bucket")


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bucket_module.RETRY, "max_retries", 1)


@pytest.mark.usefixtures("_soon")
def test_a_service_that_does_not_answer_costs_no_row(place, tmp_path) -> None:
    prefix, proxy = place
    source = open_source(put(prefix, tmp_path, ["a/0.png", "a/1.png"]))
    proxy.inject("slow_down", method="GET", key="1.png", times=math.inf)
    for read in (source.payload, source.image, lambda _: build_manifest(source)):
        with pytest.raises(StoreUnavailableError, match="does not answer as it should"):
            read(1)


def shard(rows: range) -> bytes:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in rows:
            for name, data in ((f"{row:03d}.png", png(row)), (f"{row:03d}.cls", b"%d" % (row % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class TestShards:
    @pytest.fixture
    def uri(self, place: tuple[str, FaultProxy]) -> str:
        for number in range(2):
            upload(f"{place[0]}/s-{number}.tar", shard(range(10 * number, 10 * number + 10)))
        upload(f"{place[0]}/deeper/s-9.tar", b"not looked at")
        upload(f"{place[0]}/._s-0.tar", b"what a file manager leaves")
        return f"webdataset:s3://{BUCKET}/{place[0]}"

    @pytest.mark.parametrize("pattern", ["/", "/*.tar", "/s-{0..1}.tar", "/s-[01].tar"])
    def test_named_by_patterns(self, uri, pattern) -> None:
        source = open_source(uri + pattern)
        assert list(source.ids) == [f"{row:03d}" for row in range(20)]
        assert source.labels.tolist() == [row % 3 for row in range(20)]
        assert source.payload(13) == png(13)

    def test_a_second_run_reads_no_shard(self, uri, place, tmp_path) -> None:
        proxy, cache, roots = place[1], tmp_path / "hashes", []
        for _ in range(2):
            hash_cache = HashCache(cache)
            source = open_source(f"{uri}/*.tar", hash_cache=hash_cache)
            roots.append(build_manifest(source, hash_cache=hash_cache).root)
            assert proxy.count("GET", ".tar") == 2  # indexed and hashed in one reading
        assert roots[0] == roots[1]

    def test_an_extension_that_is_no_images_is_hashed_as_well(self, place, tmp_path) -> None:
        upload(f"{place[0]}/a.tar", shard(range(3)))
        hash_cache = HashCache(tmp_path / "hashes")
        source = open_source(f"webdataset:s3://{BUCKET}/{place[0]}/a.tar?image=cls&label=", hash_cache=hash_cache)
        digests = build_manifest(source, hash_cache=hash_cache).sha256
        assert [row.tobytes() for row in digests] == [hashlib.sha256(b"%d" % row).digest() for row in range(3)]

    def test_keys_that_repeat_have_the_same_ids_as_on_disk(self, place, tmp_path) -> None:
        for name in "ab":
            upload(f"{place[0]}/{name}.tar", shard(range(2)))
            (tmp_path / f"{name}.tar").write_bytes(shard(range(2)))
        ids = ["a/000", "a/001", "b/000", "b/001"]
        assert list(open_source(f"webdataset:{tmp_path}").ids) == ids
        assert list(open_source(f"webdataset:s3://{BUCKET}/{place[0]}/*.tar").ids) == ids

    def test_rows_side_by_side_are_one_request(self, uri, place) -> None:
        source = open_source(f"{uri}/*.tar")
        before = place[1].count("GET", ".tar")
        source.expect(range(20))  # type: ignore[attr-defined]
        assert [source.payload(row) for row in range(20)] == [png(row) for row in range(20)]
        assert place[1].count("GET", ".tar") == before + 2

    def test_one_that_is_missing_or_changed(self, uri, place) -> None:
        with pytest.raises(DatasetError, match=r"s-2\.tar: got no such object"):
            open_source(f"{uri}/s-{{0..2}}.tar")
        with pytest.raises(UsageError, match="wildcards in a folder of a bucket"):
            open_source(f"{uri}/*/s.tar")
        source = open_source(f"{uri}/*.tar")
        upload(f"{place[0]}/s-1.tar", shard(range(100, 110)))
        with pytest.raises(IntegrityError, match=r"tar shard s3://.*/s-1\.tar: changed since it was indexed"):
            source.payload(15)

    def test_one_that_is_cut_off(self, uri, place) -> None:
        upload(f"{place[0]}/s-1.tar", shard(range(10, 20))[:9000])
        with pytest.raises(DatasetError, match=r"shard s3://.*/s-1\.tar: was cut off"):
            open_source(f"{uri}/*.tar")


@pytest.mark.parametrize("kind", [ThreadFetcher, ProcessFetcher])
def test_fetching_in_threads_and_in_a_process(kind, place) -> None:
    prefix, _ = place
    data = bytes(np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8))
    upload(f"{prefix}/a", data)
    fetcher = kind(Bucket(Location(None, BUCKET, prefix), "data sets"))
    parts = [Part("a", start, 1 << 20) for start in range(0, 3 << 20, 1 << 20)]
    assert b"".join(answer.result() for answer in [fetcher.submit(part) for part in parts]) == data
    with pytest.raises(FileNotFoundError):
        fetcher.submit(Part("b", 0, 1)).result()
    with pytest.raises(bucket_module.ChangedError):
        fetcher.submit(Part("a", 0, 1, etag='"other"')).result()
    fetcher.close()
    assert threading.active_count() < 50


def test_the_process_that_reads_is_killed(place) -> None:
    prefix, _ = place
    fetcher = ProcessFetcher(Bucket(Location(None, BUCKET, prefix), "data sets"))
    fetcher._process.kill()
    with pytest.raises(IncompleteError, match="the process that reads it has ended"):
        fetcher.submit(Part("a", 0, 1)).result(60)
    fetcher.close()
