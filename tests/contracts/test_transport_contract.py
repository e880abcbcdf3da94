"""What every transport promises, whatever the place: a directory, or a bucket behind a real S3 API."""

from __future__ import annotations

import hashlib
import pickle
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from s3_api import S3Server

from gstds_cache.errors import UsageError
from gstds_cache.files import mapped
from gstds_cache.files.location import Location
from gstds_cache.store.factory import open_transport
from gstds_cache.store.transport import Transport, map_object

BAD_KEYS = ("", "/a", "a/", "a//b", "..", "../a", "a/../b", ".hidden", "a/.b", "a b", "a\n", "\u00fc", "a\\b", "x" * 65)


@pytest.fixture(params=["directory", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place where nothing is."""
    if request.param == "directory":
        return str(tmp_path / "store")
    place: str = request.getfixturevalue("s3_prefix")
    return place


@pytest.fixture
def transport(where: str) -> Transport:
    return open_transport(Location.parse(where))


def from_outside(where: str, key: str, server: S3Server) -> bytes | None:
    """An object as the place itself has it."""
    if not where.startswith("s3://"):
        path = Path(where, key)
        return path.read_bytes() if path.exists() else None
    parts = urlsplit(where)
    status, body = server.request("GET", f"/{parts.netloc}{parts.path}/{key}")
    return body if status == 200 else None


def test_it_is_one(transport: Transport, where: str) -> None:
    assert isinstance(transport, Transport)
    assert str(transport.location) == where


def test_a_place_with_nothing_in_it(transport: Transport) -> None:
    assert not transport.exists("shards/0")
    assert transport.sizes() == {}
    assert transport.sizes("shards/") == {}
    with pytest.raises(FileNotFoundError, match="shards/0"):
        transport.get("shards/0")
    with pytest.raises(FileNotFoundError, match="shards/0"):
        transport.sha256("shards/0")
    transport.delete("shards/0")
    assert transport.collect_temporaries() == 0


@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(range(256)), b"\r\n" * 9, b"7" * (6 << 20)], ids=["0", "1", "all", "lines", "6MB"]
)
def test_what_is_put_is_there(transport: Transport, where: str, s3_server: S3Server, data: bytes) -> None:
    transport.put("shards/c/0", data)
    assert transport.exists("shards/c/0")
    assert transport.get("shards/c/0") == data
    assert transport.sha256("shards/c/0") == hashlib.sha256(data).hexdigest()
    assert transport.sizes() == {"shards/c/0": len(data)}
    assert from_outside(where, "shards/c/0", s3_server) == data


def test_pieces_are_the_whole(transport: Transport) -> None:
    data = bytes(range(256)) * 20_001  # five pieces or so, and no multiple of one
    transport.put("large", data)
    parts = list(transport.pieces("large"))
    assert b"".join(parts) == data
    assert transport.sha256("large") == hashlib.sha256(data).hexdigest()
    assert len(parts) > 1
    assert max(map(len, parts)) < len(data) / 2
    with pytest.raises(FileNotFoundError, match="small"):
        list(transport.pieces("small"))


def test_mapped_bytes_are_put_and_got(transport: Transport) -> None:
    data = bytes(range(256)) * 20_001
    there = mapped.written(lambda file: file.write(data))
    transport.put("large", there)
    assert transport.put_if_absent("another", there)
    assert not transport.put_if_absent("another", data[1:])
    assert transport.get("large") == transport.get("another") == data
    copy = map_object(transport, "large")
    transport.put("large", b"other")
    assert copy == data
    with pytest.raises(FileNotFoundError, match="small"):
        map_object(transport, "small")


def test_put_replaces(transport: Transport) -> None:
    for data in (b"first", b"the second, which is longer", b"3"):
        transport.put("a", data)
        assert transport.get("a") == data
        assert transport.sizes() == {"a": len(data)}


def test_put_if_absent(transport: Transport) -> None:
    assert transport.put_if_absent("commits/1.json", b"one") is True
    assert transport.put_if_absent("commits/1.json", b"another") is False
    assert transport.get("commits/1.json") == b"one"
    # Whether the same bytes are "this call's" is left open: a service may not know whose they are.
    assert transport.put_if_absent("commits/1.json", b"one") in {True, False}
    assert transport.get("commits/1.json") == b"one"


def test_put_if_absent_after_delete(transport: Transport) -> None:
    assert transport.put_if_absent("a", b"one") is True
    transport.delete("a")
    assert transport.put_if_absent("a", b"two") is True
    assert transport.get("a") == b"two"


def test_put_replaces_what_was_put_if_absent(transport: Transport) -> None:
    assert transport.put_if_absent("a", b"one") is True
    transport.put("a", b"two")
    assert transport.get("a") == b"two"


def test_get_many_keeps_the_order(transport: Transport) -> None:
    keys = [f"commits/{shard}.json" for shard in range(25)]
    for key in keys:
        transport.put(key, key.encode() * 3)
    wanted = [*reversed(keys), keys[0], keys[0]]
    assert transport.get_many(wanted) == [key.encode() * 3 for key in wanted]
    assert transport.get_many([]) == []
    assert transport.get_many(keys[:1]) == [keys[0].encode() * 3]
    with pytest.raises(FileNotFoundError, match="commits/99"):
        transport.get_many([*keys, "commits/99.json", *keys])


def test_sizes_are_of_one_folder(transport: Transport) -> None:
    shards = {f"shards/c/{shard}/0": shard for shard in range(20)}  # more than a page of a listing
    for key, size in (shards | {"shards.json": 3, "shards2/c/0": 4, "shard": 5}).items():
        transport.put(key, b"x" * size)
    assert transport.sizes("shards/") == transport.sizes("shards/c/") == shards
    assert transport.sizes("shards/c/1/") == {"shards/c/1/0": 1}
    assert transport.sizes("nothing/") == {}
    assert transport.sizes() == shards | {"shards.json": 3, "shards2/c/0": 4, "shard": 5}


def test_delete(transport: Transport) -> None:
    transport.put("a/b", b"1")
    transport.put("a/c", b"2")
    transport.delete("a/b")
    transport.delete("a/b")
    transport.delete("a/never")
    assert not transport.exists("a/b")
    assert transport.sizes() == {"a/c": 1}


@pytest.mark.parametrize("key", BAD_KEYS)
def test_names_that_are_no_keys_are_refused(transport: Transport, key: str) -> None:
    for act in (
        lambda: transport.exists(key),
        lambda: transport.get(key),
        lambda: transport.get_many([key]),
        lambda: transport.put(key, b"x"),
        lambda: transport.put_if_absent(key, b"x"),
        lambda: transport.delete(key),
    ):
        with pytest.raises(UsageError, match="expected parts"):
            act()
    assert transport.sizes() == {}


def test_a_folder_is_no_object(transport: Transport) -> None:
    transport.put("a/b", b"1")
    assert not transport.exists("a")


def test_others_see_what_was_written(transport: Transport, where: str) -> None:
    other = open_transport(Location.parse(where))
    assert not other.exists("a")
    transport.put("a", b"1")
    assert other.get("a") == b"1"
    other.put("a", b"22")
    assert transport.get("a") == b"22"
    assert transport.sizes() == {"a": 2}
    other.delete("a")
    assert not transport.exists("a")


def test_it_may_be_pickled(transport: Transport) -> None:
    transport.put("a", b"1")
    copy = pickle.loads(pickle.dumps(transport))
    assert copy.location == transport.location
    assert copy.get("a") == b"1"


def test_lock_can_be_taken_again_and_leaves_nothing(transport: Transport) -> None:
    for number in range(2):
        with transport.lock():
            transport.put("a", b"1")
            assert transport.put_if_absent(f"b{number}", b"2") is True
            assert transport.put_if_absent(f"b{number}", b"3") is False
    assert transport.sizes() == {"a": 1, "b0": 1, "b1": 1}


def test_lock_ends_with_an_error(transport: Transport) -> None:
    with pytest.raises(KeyError), transport.lock():
        raise KeyError("work failed")
    with transport.lock():
        transport.put("a", b"1")


def test_temporaries_are_no_objects(transport: Transport) -> None:
    transport.put("a", b"1")
    assert transport.collect_temporaries() == 0
    assert transport.sizes() == {"a": 1}


def test_use_and_room_are_known_or_none(transport: Transport) -> None:
    transport.mark_used()
    assert transport.last_used() is None
    with transport.lock():
        transport.put("a", b"1")
    transport.mark_used()
    used, room = transport.last_used(), transport.free_bytes()
    assert used is None or used > 1.7e9
    assert room is None or room > 0


def test_several_threads(transport: Transport) -> None:
    failed = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                transport.put(f"t{number}/{turn}", b"x" * number)
                assert transport.get(f"t{number}/{turn}") == b"x" * number
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert transport.sizes() == {f"t{number}/{turn}": number for number in range(6) for turn in range(4)}
