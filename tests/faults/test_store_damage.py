"""Damage done with ordinary file operations: what a plain Zarr reader would see, what ours says, what mends it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_store
import zarr
from click.testing import CliRunner
from real_store import BAD, ITEMS, SHARD, SHARDS, Images, files_of, leftovers, objects_of, repair, stamps

from gstds_cache.errors import ChunkCorruptError, GstdsError, IncompleteError, IntegrityError, StoreNotFoundError
from gstds_cache.store import layout
from gstds_cache.store.access import Kind
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.verify import verify

GOOD = np.array([row for row in range(ITEMS) if row != BAD])
KINDS: tuple[Kind, ...] = ("memory", "mirror", "window")
Damage = Callable[[Path], object]


def flip(path: Path, place: int = -1, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(bytes(data))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def read(store: Path, access: Kind = "memory") -> np.ndarray:
    return EmbeddingStore(store, access=access).gather(GOOD)


def plainly(store: Path, rows: slice = slice(None)) -> np.ndarray:
    """What somebody sees who knows zarr and nothing of commit records."""
    return zarr.open_group(store, mode="r")["embeddings"][rows]


def mended_to(store: Path, reference: Path, shards: list[int], before: dict[str, tuple[int, int]]) -> None:
    """``repair`` makes ``shards`` anew and no other; the store is then the one it was, ``before`` being its stamps."""
    report = repair(store)
    assert report.before.problems
    assert list(report.shards) == shards
    assert report.images == sum(len(range(shard * SHARD, min((shard + 1) * SHARD, ITEMS))) for shard in shards)
    assert (report.changed, report.after.problems, report.after.complete) == ((), (), True)
    assert objects_of(store) == objects_of(reference)
    assert leftovers(store) == []
    sound = [shard for shard in range(SHARDS) if shard not in shards]
    keys = {key(shard) for shard in sound for key in (layout.object_key, CURRENT.commit_key)}
    assert stamps(store, sound) == {key: stamp for key, stamp in before.items() if key in keys}


# ---- one shard's object


@dataclass(frozen=True)
class Harm:
    """A way to damage an object, what zarr makes of it, and whether ours notices before anything is read."""

    do: Damage
    zarr_sees: str
    at_opening: bool


HARM = {
    "deleted": Harm(Path.unlink, "NaN", True),
    "a folder": Harm(to_folder, "NaN", True),
    "empty": Harm(lambda path: path.write_bytes(b""), "checksum", True),
    "truncated": Harm(lambda path: path.write_bytes(path.read_bytes()[:-7]), "checksum", True),
    "longer": Harm(lambda path: path.write_bytes(path.read_bytes() + b"x"), "checksum", True),
    "first byte": Harm(lambda path: flip(path, 0), "checksum", False),
    "middle byte": Harm(lambda path: flip(path, path.stat().st_size // 2), "checksum", False),
    "last byte of the rows": Harm(lambda path: flip(path, -5, 128), "checksum", False),
    "checksum": Harm(lambda path: flip(path, -1), "checksum", False),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_damaged_object_is_an_error_that_names_shard_and_command_and_is_mended(
    whole: Path, reference: Path, harm: Harm, tally
) -> None:
    before = stamps(whole)
    harm.do(whole / layout.object_key(1))
    tally.faults += 1
    if harm.zarr_sees == "NaN":
        assert np.isnan(plainly(whole, slice(8, 16))).all()  # without a word
    else:
        with pytest.raises(ValueError, match="checksum do not match"):
            plainly(whole, slice(8, 16))
    for access in KINDS:
        with pytest.raises(ChunkCorruptError, match="shard 1") as caught:
            read(whole, access)
        assert f"gstds-cache repair {whole}" in caught.value.hint
    assert verify(whole, "quick").bad_shards == ([1] if harm.at_opening else [])
    assert verify(whole, "full").bad_shards == [1]
    if harm.at_opening:
        with pytest.raises(ChunkCorruptError, match="shard 1"):
            EmbeddingStore(whole)
    else:
        np.testing.assert_array_equal(EmbeddingStore(whole, access="window").gather(GOOD[:7]), read(reference)[:7])
    mended_to(whole, reference, [1], before)


@pytest.mark.parametrize("harm", ["swapped", "older"])
def test_other_rows_with_a_right_checksum_are_found_by_a_full_verify_alone(
    whole: Path, reference: Path, tmp_path: Path, harm: str, tally
) -> None:
    """The checksum in an object says that its bytes are whole, not whose they are: a read of it sees nothing."""
    other, shard = whole, 1
    if harm == "older":
        other, shard = tmp_path / "older", 2
        real_store.embed(other, Images(seed=1))
    before = stamps(whole)
    shutil.copyfile(other / layout.object_key(shard), whole / layout.object_key(2))
    tally.faults += 1
    wrong = plainly(other, slice(shard * SHARD, shard * SHARD + 6))
    assert not (wrong == plainly(reference, slice(16, 22))).any(axis=1).any()
    np.testing.assert_array_equal(plainly(whole, slice(16, 22)), wrong)
    np.testing.assert_array_equal(EmbeddingStore(whole, access="window").gather(np.arange(16, 22)), wrong)
    assert verify(whole, "quick").problems == ()
    assert verify(whole, "full").bad_shards == [2]
    with pytest.raises(
        IntegrityError, match="verify STORE --level full"
    ):  # a mirror is compared with the commit records
        read(whole, "mirror")
    mended_to(whole, reference, [2], before)


def test_an_object_deleted_after_opening_is_an_error_too(whole: Path, tally) -> None:
    reader = EmbeddingStore(whole, access="window")
    (whole / layout.object_key(1)).unlink()
    tally.faults += 1
    with pytest.raises(ChunkCorruptError, match="shard 1"):
        reader.gather(np.array([9]))


# ---- commit records, COMPLETE and the small objects


def of_another_shard(path: Path) -> None:
    shutil.copyfile(path.with_name("0.json"), path)


def of_another_store(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"fingerprint":"', b'"fingerprint":"0')[:-1])


RECEIPT: dict[str, Damage] = {
    "deleted": Path.unlink,
    "a folder": to_folder,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no JSON": lambda path: flip(path, 0),
    "not as written": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "of another shard": of_another_shard,
    "of another store": of_another_store,
    "other hash": lambda path: path.write_bytes(path.read_bytes().replace(b'object_sha256":"', b'object_sha256":"0')),
    "other size": lambda path: path.write_bytes(path.read_bytes().replace(b'"size":', b'"size":1')),
}


@pytest.mark.parametrize("harm", RECEIPT.values(), ids=RECEIPT)
def test_a_damaged_commit_is_found_when_the_store_is_opened_and_its_shard_is_made_anew(
    whole: Path, reference: Path, harm: Damage, tally
) -> None:
    before = stamps(whole)
    harm(whole / CURRENT.commit_key(1))
    tally.faults += 1
    np.testing.assert_array_equal(plainly(whole), plainly(reference))  # the rows are all there
    with pytest.raises(ChunkCorruptError) as caught:
        EmbeddingStore(whole)
    assert f"gstds-cache repair {whole}" in caught.value.hint
    mended_to(whole, reference, [1], before)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"made to fail", b"made to fall"), (b'"row":3', b'"row":2'), (b'"rows":[0,8]', b'"rows":[0,9]')],
    ids=["reason", "quarantined row", "rows"],
)
def test_a_commit_that_tells_something_else_is_found_and_never_confirmed(
    whole: Path, reference: Path, old: bytes, new: bytes, tally
) -> None:
    """Nobody can say which of the commit records was altered: all shards are made again."""
    path = whole / CURRENT.commit_key(0)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    tally.faults += 1
    with pytest.raises(ChunkCorruptError):
        EmbeddingStore(whole)
    assert verify(whole).problems
    assert repair(whole).after.problems == ()
    assert objects_of(whole) == objects_of(reference)


@pytest.mark.parametrize("harm", ["no JSON", "a list", "empty", "a folder", "of another store", "counts", "space"])
def test_a_damaged_complete_is_found_when_the_store_is_opened(
    whole: Path, reference: Path, tmp_path: Path, harm: str, tally
) -> None:
    before, path = stamps(whole), whole / layout.COMPLETE
    if harm == "of another store":
        real_store.embed(tmp_path / "other", Images(seed=1))
        shutil.copyfile(tmp_path / "other" / layout.COMPLETE, path)
    elif harm == "counts":
        path.write_bytes(path.read_bytes().replace(b'"ok":21', b'"ok":20'))
    elif harm == "a folder":
        to_folder(path)
    else:
        path.write_bytes({"no JSON": b"{", "a list": b"[]", "empty": b"", "space": path.read_bytes() + b" "}[harm])
    tally.faults += 1
    if harm == "a folder":  # as if it were not there: the same run again would have to write it, and says what is wrong
        with pytest.raises(IncompleteError):
            EmbeddingStore(whole)
        path.rmdir()
        assert real_store.embed(whole).embedded == 0
        assert objects_of(whole) == objects_of(reference)
        return
    with pytest.raises(ChunkCorruptError, match=layout.COMPLETE) as caught:
        EmbeddingStore(whole)
    assert f"gstds-cache repair {whole}" in caught.value.hint
    mended_to(whole, reference, [], before)


def test_a_store_without_complete_is_finished_by_the_same_run(whole: Path, reference: Path, tally) -> None:
    (whole / layout.COMPLETE).unlink()
    tally.faults += 1
    with pytest.raises(IncompleteError, match="not complete"):
        EmbeddingStore(whole)
    before = stamps(whole)
    assert real_store.embed(whole).embedded == 0
    assert objects_of(whole) == objects_of(reference)
    assert stamps(whole) == before


SMALL = [layout.LABEL, layout.VALID, layout.ITEMS, "embeddings/zarr.json", "label/zarr.json", "valid/zarr.json"]


@pytest.mark.parametrize("harm", ["flipped", "deleted", "empty", "a folder"])
@pytest.mark.parametrize("key", SMALL)
def test_a_damaged_small_object_is_found_when_the_store_is_opened(
    whole: Path, reference: Path, key: str, harm: str, tally
) -> None:
    before = stamps(whole)
    harms: dict[str, Damage] = {"flipped": flip, "deleted": Path.unlink, "a folder": to_folder,
                                "empty": lambda path: path.write_bytes(b"")}  # fmt: skip
    harms[harm](whole / key)
    tally.faults += 1
    with pytest.raises(ChunkCorruptError, match=key):
        EmbeddingStore(whole)
    mended_to(whole, reference, [], before)


@pytest.mark.parametrize("key", [layout.LABEL, layout.ITEMS, "embeddings/zarr.json", "label/zarr.json"])
def test_a_small_object_damaged_in_the_middle_of_a_run_is_not_confirmed_at_its_end(
    whole: Path, reference: Path, key: str, tally
) -> None:
    (whole / layout.COMPLETE).unlink()
    flip(whole / key)
    tally.faults += 1
    real_store.embed(whole)
    assert objects_of(whole) == objects_of(reference)


@pytest.mark.parametrize("harm", ["deleted", "truncated", "specification"])
def test_without_its_group_nobody_knows_what_a_store_holds(whole: Path, harm: str, tally) -> None:
    path = whole / layout.GROUP
    text = path.read_text()
    path.write_text(text[:-9] if harm == "truncated" else text.replace('"batch_size": 4', '"batch_size": 2'))
    if harm == "deleted":
        path.unlink()
    tally.faults += 1
    there = objects_of(whole)
    for act in (EmbeddingStore, verify, repair):
        with pytest.raises(StoreNotFoundError if harm == "deleted" else IntegrityError) as caught:
            act(whole)
        assert ("gstds-embed" if harm == "deleted" else "from a copy") in caught.value.hint
    assert objects_of(whole) == there


@pytest.mark.parametrize(("old", "new"), [('"b"', '"B"'), ('"zarr_format": 3', '"zarr_format": 4')])
def test_what_a_group_says_beside_the_specification_is_mended(
    whole: Path, reference: Path, old: str, new: str, tally
) -> None:
    before, path = stamps(whole), whole / layout.GROUP
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    tally.faults += 1
    with pytest.raises(ChunkCorruptError, match=r"zarr\.json was altered"):
        EmbeddingStore(whole)
    mended_to(whole, reference, [], before)


# ---- one byte anywhere


def noticed(store: Path) -> bool:
    """By opening, by reading or by a full verify."""
    try:
        with suppress(GstdsError):
            read(store)
            return bool(verify(store, "full").problems)
    except (OSError, ValueError, TypeError) as error:
        pytest.fail(f"no error of ours: {error!r}")
    return True


@pytest.mark.parametrize("how_many", ["some", pytest.param("all", marks=pytest.mark.faults)])
def test_one_altered_byte_anywhere_is_noticed(whole: Path, reference: Path, tally, how_many: str) -> None:
    rng = tally.rng("bytes")
    assert not noticed(whole)
    unseen, objects = [], objects_of(reference)
    assert (
        len(objects) == 4 + SHARDS + 2 + SHARDS + 2
    )  # zarr.json, shards, label and valid, commit records, items and COMPLETE
    for key, data in objects.items():
        places = {0, len(data) // 2, len(data) - 1, rng.randrange(len(data))}
        for place in range(len(data)) if how_many == "all" else places:
            flip(whole / key, place, rng.randrange(1, 256))
            tally.faults += 1
            unseen += [] if noticed(whole) else [(key, place, (whole / key).read_bytes()[place])]
            (whole / key).write_bytes(data)
    assert unseen == []


def test_an_altered_commit_of_a_store_that_is_not_complete_is_noticed(whole: Path) -> None:
    (whole / layout.COMPLETE).unlink()
    path = whole / CURRENT.commit_key(0)
    path.write_bytes(path.read_bytes().replace(b'"row":3', b'"row":2'))
    with pytest.raises(IntegrityError):
        EmbeddingStore(whole, allow_partial=True).gather(np.array([BAD]))


# ---- the disk refuses


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root, too, may then do only what a file's mode says (Linux capabilities, given back at the end)."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept = (ctypes.c_uint32 * 6)()
    none = (ctypes.c_uint32 * 6)()
    if libc.capget(header, kept):
        pytest.skip("capabilities cannot be asked for")
    none[:] = kept[:]
    none[0] = kept[0] & ~0b110  # effective: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH
    if libc.capset(header, none):
        pytest.skip("capabilities cannot be given up")
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("key", [layout.object_key(1), CURRENT.commit_key(1), layout.LABEL, layout.COMPLETE])
def test_an_unreadable_file_is_an_error_that_names_it_and_no_damage(
    whole: Path, reference: Path, key: str, tally
) -> None:
    with mode(whole / key, 0), without_privileges(), pytest.raises(PermissionError) as caught:
        read(whole)
    tally.faults += 1
    assert caught.value.filename == str(whole / key)
    np.testing.assert_array_equal(read(whole), read(reference))


def test_a_folder_that_may_only_be_read_is_read_and_not_written(
    whole: Path, reference: Path, tmp_path: Path, tally
) -> None:
    folders = [whole, *(path for path in whole.rglob("*") if path.is_dir())]
    (whole / layout.COMPLETE).unlink()
    for folder in folders:
        folder.chmod(0o555)
    try:
        with without_privileges():
            rows = EmbeddingStore(whole, allow_partial=True, access="memory").gather(GOOD)
            with pytest.raises(PermissionError) as caught:
                real_store.embed(whole)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    tally.faults += 1
    assert str(whole) in str(caught.value.filename)
    np.testing.assert_array_equal(rows, read(reference))
    real_store.embed(whole)
    assert objects_of(whole) == objects_of(reference)


@pytest.mark.parametrize("key", [layout.object_key(1), CURRENT.commit_key(1), layout.GROUP, layout.COMPLETE])
def test_a_disk_that_cannot_be_read_is_no_damage_to_the_store(
    whole: Path, monkeypatch: pytest.MonkeyPatch, key: str, tally
) -> None:
    """What cannot be read now must not be taken for missing, and be thrown away by a repair."""
    there, opened = objects_of(whole), Path.open

    def broken(path: Path, *args: Any, **options: Any) -> Any:
        if path == whole / key:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        for act in (read, lambda store: verify(store, "full"), repair):
            with pytest.raises(OSError, match="Input/output error"):
                act(whole)
            tally.faults += 1
    assert objects_of(whole) == there


@pytest.mark.parametrize(("code", "words"), [(errno.EIO, "the disk reported an error"), (errno.ENOSPC, "disk is full")])
def test_the_command_says_what_the_disk_said(
    tmp_path: Path, image_folder: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, code: int, words: str, tally
) -> None:
    from gstds_cache.cli.embed_command import main

    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "stores"))
    command = [f"imagefolder:{image_folder}", "--model", tiny_model, "--cache", str(tmp_path / "s"), "--shard-rows",
               "8", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--json"]  # fmt: skip
    commits, fsync = tmp_path / "s" / "commits", os.fsync

    def broken(descriptor: int) -> None:
        if commits.is_dir() and len(list(commits.iterdir())) >= 3:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        failed = CliRunner().invoke(main, command)
    tally.faults += 1
    assert failed.exit_code == 4, failed.output
    assert words in failed.stderr
    assert "run the same command again" in failed.stderr
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout.splitlines()[-1])["committed_before"] < 60
    assert leftovers(tmp_path / "s") == []
    assert verify(tmp_path / "s", "full").problems == ()


def test_files_with_other_names_are_nobodys_business(whole: Path, reference: Path) -> None:
    for key in ("notes.txt", "commits/notes.txt", ".hidden"):
        (whole / key).write_text("mine")
    np.testing.assert_array_equal(read(whole), read(reference))
    assert verify(whole, "full").problems == ()
    assert "notes.txt" in files_of(whole)
