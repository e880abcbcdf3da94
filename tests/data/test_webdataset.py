"""Tar shards as webdataset, img2dataset and others write them: images, labels, keys, and shards that are not whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gstds_cache.data import members as members_module
from gstds_cache.data import shard_reading, shards, webdataset
from gstds_cache.data.decode import Decoding, UndecodableError, decoding_as
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import build_manifest
from gstds_cache.data.shards import Shard, Shards
from gstds_cache.data.sources import open_source
from gstds_cache.errors import DatasetError, IntegrityError, UsageError


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(path: Path, members: list[tuple[str, bytes]], query: str = "") -> list[Any]:
    write(path, [(f"{row}.png", png(row)) if name == "" else (name, data) for row, (name, data) in enumerate(members)])
    source = open_source(f"webdataset:{path}{query}")
    return [source.classes[label] if source.classes and label >= 0 else int(label) for label in source.labels]


class TestLabels:
    def samples(self, extension: str, contents: list[bytes]) -> list[tuple[str, bytes]]:
        return [
            member
            for row, content in enumerate(contents)
            for member in ((f"{row}.png", png(row)), (f"{row}.{extension}", content))
        ]

    def test_cls_is_a_number_or_a_name(self, tmp_path) -> None:
        assert labelled(tmp_path / "a.tar", self.samples("cls", [b"2", b" 0\n", b""])) == [2, 0, -1]
        assert labelled(tmp_path / "b.tar", self.samples("cls", [b"owl", b"cat\n"])) == ["owl", "cat"]

    def test_json_has_them_in_a_field(self, tmp_path) -> None:
        rows = [{"label": 3, "about": {"kind": "x"}, "a.b": "u"}, {"about": {"kind": "y"}, "a.b": "v"}]
        members = self.samples("json", [json.dumps(row).encode() for row in rows])
        assert labelled(tmp_path / "a.tar", members) == [3, -1]
        assert labelled(tmp_path / "a.tar", members, "?label=about.kind") == ["x", "y"]
        assert labelled(tmp_path / "a.tar", members, "?label=json.a.b") == ["u", "v"]
        assert labelled(tmp_path / "a.tar", members, "?label=") == [-1, -1]
        with pytest.raises(UsageError, match=r"'abuot'; there are: about, a\.b, label"):
            labelled(tmp_path / "a.tar", members, "?label=abuot")

    def test_txt_is_read_when_asked_for(self, tmp_path) -> None:
        members = self.samples("txt", [b"a cat", b"an owl"])
        assert labelled(tmp_path / "a.tar", members) == [-1, -1]
        source = open_source(f"webdataset:{tmp_path / 'a.tar'}")
        assert source.notes == ("labels: the samples have no member cls; take txt by label=txt",)
        assert labelled(tmp_path / "a.tar", members, "?label=txt") == ["a cat", "an owl"]
        assert labelled(tmp_path / "a.tar", self.samples("class", [b"1", b"0"]), "?label=.class") == [1, 0]

    def test_what_is_no_label(self, tmp_path) -> None:
        with pytest.raises(DatasetError, match="sample '1': its json member is none"):
            labelled(tmp_path / "a.tar", self.samples("json", [b"{}", b"{"]))
        with pytest.raises(DatasetError, match="sample '1' .*got the label"):
            labelled(tmp_path / "a.tar", self.samples("json", [b'{"label": 1}', b'{"label": [1, 2]}']))
        with pytest.raises(UsageError, match=r"label=\.png, which is an image"):
            labelled(tmp_path / "a.tar", self.samples("cls", [b"1"]), "?label=.png")


class TestImages:
    def test_one_of_two_is_asked_for(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("1.jpg", png(1)), ("1.png", png(2)), ("2.png", png(3))])
        with pytest.raises(DatasetError, match="got 2 images in the sample '1': jpg, png") as caught:
            open_source(f"webdataset:{path}")
        assert "?image=jpg" in caught.value.hint
        both = open_source(f"webdataset:{path}?image=jpg;png")
        assert [both.payload(row) for row in (0, 1)] == [png(1), png(3)]
        only = open_source(f"webdataset:{path}?image=png")
        assert [only.payload(row) for row in (0, 1)] == [png(2), png(3)]

    def test_a_plain_extension_goes_before_one_with_a_dot(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("1.seg.png", png(1)), ("1.PNG", png(2)), ("2.seg.png", png(3))])
        source = open_source(f"webdataset:{path}")
        assert [source.payload(row) for row in (0, 1)] == [png(2), png(3)]

    def test_a_sample_without_an_image_is_an_item(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("1.txt", b"x"), ("2.png", png(2)), ("3.png", b"")])
        source = open_source(f"webdataset:{path}")
        assert (list(source.ids), source.payload(0), source.payload(2)) == (["1", "2", "3"], b"", b"")
        for row, reason in ((0, "no image in the sample"), (2, "empty file")):
            with pytest.raises(UndecodableError, match=reason):
                source.image(row)
        assert source.notes[0] == "1 of 3 samples have no image; they are items that cannot be decoded"

    def test_they_are_decoded_as_the_block_around_says(self, tmp_path) -> None:
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "JPEG")
        source = open_source(f"webdataset:{write(tmp_path / 'a.tar', [('1.jpg', file.getvalue())])}")
        with decoding_as(Decoding(side=16)):
            assert source.image(0).size == (16, 16)
        with decoding_as(Decoding(max_pixels=64 * 64 - 1)), pytest.raises(UndecodableError, match="too many pixels"):
            source.image(0)

    def test_none_at_all(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("1.txt", b"x"), ("1.npy", b"x")])
        with pytest.raises(
            DatasetError, match="got 1 samples of which none has an image; the members' extensions are npy, txt"
        ):
            open_source(f"webdataset:{path}")


class TestKeys:
    def test_long_names_are_ids(self, tmp_path) -> None:
        names = ["folder/" * 40 + "größe", "x" * 400]
        path = write(tmp_path / "a.tar", [(f"{name}.png", png(1)) for name in names])
        assert list(open_source(f"webdataset:{path}").ids) == names

    def test_keys_that_repeat_across_shards_are_prefixed_by_the_shard(self, tmp_path) -> None:
        for name in ("a", "b"):
            write(tmp_path / f"{name}.tar", [("0.png", png(1)), ("1.png", png(2))])
        source = open_source(f"webdataset:{tmp_path}/{{a,b}}.tar")
        assert list(source.ids) == ["a/0", "a/1", "b/0", "b/1"]
        assert source.notes[0] == "ids are SHARD/KEY: the key '0' is in more than one shard"

    def test_they_are_the_same_in_a_bucket(self) -> None:
        for folder in ("/", "/data/x/", "s3://bucket/", "s3://bucket/x/"):
            paths = [f"{folder}{name}.tar" for name in ("s0", "deep/s1")]
            assert Shards(tuple(Shard(path, path, (1, 1, 1, 1)) for path in paths)).stems() == ["s0", "deep/s1"]

    def test_a_key_twice_in_one_shard_is_refused(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2)), ("0.cls", b"1")])
        with pytest.raises(DatasetError, match=r"a\.tar: got the key '0' for two samples of it"):
            open_source(f"webdataset:{path}")


class TestPatterns:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for number in (2, 10, 1):
            write(tmp_path / f"s-{number:03d}.tar", [(f"k{number}.png", png(number))])
        return tmp_path

    @pytest.mark.parametrize("pattern", ["", "/*.tar", "/s-[0-9]*.tar", "/s-{001,002,010}.tar", "/s-0{01..02}.tar"])
    def test_shards_in_order(self, folder, pattern) -> None:
        expected = ["k1", "k2", "k10"][: 2 if ".." in pattern else 3]
        assert list(open_source(f"webdataset:{folder}{pattern}").ids) == expected

    def test_hidden_files_are_none(self, folder) -> None:
        (folder / "._s-001.tar").write_bytes(b"what a file manager leaves")
        assert list(open_source(f"webdataset:{folder}").ids) == ["k1", "k2", "k10"]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("/s-{001..003}.tar", r"s-003\.tar: got nothing there, expected a tar file; it is one of 3"),
            ("/t-*.tar", r"has no \.tar file"),
            ("/s-{003..001}.tar", r"got the range \{003\.\.001\}, expected one that counts upwards"),
            ("/s-{0..9999999}.tar", "more than 1,000,000 shards"),
        ],
    )
    def test_what_names_no_shard(self, folder, pattern, message) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(f"webdataset:{folder}{pattern}")
        with pytest.raises(UsageError, match="got no shards"):
            open_source("webdataset:")

    def test_a_bare_tar_file(self, folder) -> None:
        with pytest.raises(UsageError) as caught:
            open_source(f"{folder}/s-001.tar")
        assert caught.value.hint == f"did you mean 'webdataset:{folder}/s-001.tar'?"


class TestShardsThatAreNotWhole:
    def test_one_that_is_cut_off_is_named(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2))])
        whole = path.read_bytes()
        path.write_bytes(whole[:1600])
        with pytest.raises(DatasetError, match=r"shard .*a\.tar: was cut off: it has 1600 bytes"):
            open_source(f"webdataset:{path}")
        path.write_bytes(whole[:2048])
        with pytest.raises(DatasetError, match="without the mark") as caught:
            open_source(f"webdataset:{path}")
        assert "truncate -s +1024" in caught.value.hint
        os.truncate(path, 2048 + 1024)
        assert len(open_source(f"webdataset:{path}")) == 2

    def test_one_that_changed_since_it_was_indexed(self, tmp_path) -> None:
        path = write(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2))])
        source = open_source(f"webdataset:{path}")
        assert source.payload(0) == png(1)
        os.utime(path, ns=(1, 1))
        for read in (source.payload, source.image):
            with pytest.raises(IntegrityError, match=r"tar shard .*a\.tar: changed since it was indexed"):
                read(1)
        with pytest.raises(IntegrityError, match="changed since it was indexed"):
            build_manifest(source)
        path.unlink()
        with pytest.raises(IntegrityError, match=r"a\.tar: is there no longer"):
            open_source_again(source).payload(1)


def open_source_again(source: Any) -> Any:
    import pickle

    return pickle.loads(pickle.dumps(source))  # which has no file open


class TestTheIndexThatIsKept:
    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        paths: list[str] = []
        monkeypatch.setattr("gstds_cache.data.hash_cache.RACY_NS", 0)

        class Counted(shard_reading._File):
            def __init__(self, path: str) -> None:
                paths.append(path)
                super().__init__(path)

        monkeypatch.setattr(shard_reading, "_File", Counted)
        return paths

    def test_a_second_run_opens_no_shard(self, tmp_path, opened) -> None:
        for name in "ab":
            members = [
                (f"{name}{row}.{kind}", png(row) if kind == "png" else b"1")
                for row in range(3)
                for kind in ("png", "cls")
            ]
            write(tmp_path / f"{name}.tar", members)
        uri, cache = f"webdataset:{tmp_path}", tmp_path / "hashes"
        first = build_manifest(open_source(uri, hash_cache=HashCache(cache)), hash_cache=HashCache(cache))
        assert len(opened) > 0
        opened.clear()
        second = build_manifest(open_source(uri, hash_cache=HashCache(cache)), hash_cache=HashCache(cache))
        assert (opened, second.root) == ([], first.root)
        (tmp_path / "a.tar").write_bytes((tmp_path / "b.tar").read_bytes())
        (tmp_path / "b.tar").unlink()
        assert open_source(uri, hash_cache=HashCache(cache)).ids[0] == "b0"
        assert opened == [str(tmp_path / "a.tar")]

    def test_one_that_is_replaced_after_it_was_opened_vouches_for_nothing(self, tmp_path, opened) -> None:
        path, cache = write(tmp_path / "a.tar", [("0.png", png(1))]), tmp_path / "hashes"
        source = open_source(f"webdataset:{path}", hash_cache=HashCache(cache))
        assert source.payload(0) == png(1)  # from here on the file is open
        write(tmp_path / "new", [("0.png", png(2))]).replace(path)
        build_manifest(source, hash_cache=HashCache(cache))
        hash_cache = HashCache(cache)
        manifest = build_manifest(open_source(f"webdataset:{path}", hash_cache=hash_cache), hash_cache=hash_cache)
        assert manifest.sha256[0].tobytes() == hashlib.sha256(png(2)).digest()

    def test_a_new_kind_of_image_is_looked_for_again(self, tmp_path, opened, monkeypatch) -> None:
        path, cache = write(tmp_path / "a.tar", [("0.seg.png", png(1)), ("0.new", png(2))]), tmp_path / "hashes"
        for kinds, expected in (((".png",), png(1)), ((".png", ".new"), png(2))):
            monkeypatch.setattr(webdataset, "IMAGE_EXTENSIONS", kinds)
            monkeypatch.setattr(members_module, "_IMAGES", frozenset(kind[1:] for kind in kinds))
            hash_cache = HashCache(cache)
            source = open_source(f"webdataset:{path}", hash_cache=hash_cache)
            manifest = build_manifest(source, hash_cache=hash_cache)
            assert manifest.sha256[0].tobytes() == hashlib.sha256(expected).digest()

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
    def test_a_damaged_index_is_made_again(self, tmp_path, opened, damage) -> None:
        write(tmp_path / "a.tar", [("0.png", png(1)), ("0.cls", b"1")])
        cache = tmp_path / "hashes"
        open_source(f"webdataset:{tmp_path}", hash_cache=HashCache(cache))
        kept = list((cache / "shards").iterdir())
        assert len(kept) == 2
        for path in kept:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes({"cut": data[:-3], "flip": data, "empty": b""}[damage])
        opened.clear()
        source = open_source(f"webdataset:{tmp_path}", hash_cache=HashCache(cache))
        assert (source.labels.tolist(), opened) == ([1], [str(tmp_path / "a.tar")])

    def test_nothing_can_be_written(self, tmp_path) -> None:
        write(tmp_path / "a.tar", [("0.png", png(1))])
        (tmp_path / "hashes").write_bytes(b"")
        os.utime(tmp_path / "a.tar", ns=(1, 1))
        source = open_source(f"webdataset:{tmp_path}/a.tar", hash_cache=HashCache(tmp_path / "hashes"))
        # Its inode changed just now, so nothing is kept, and nothing has to be said.
        assert len(source) == 1


def test_more_shards_than_may_be_open(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_reading, "OPEN_FILES", 2)
    for number in range(5):
        write(tmp_path / f"{number}.tar", [(f"k{number}.png", png(number))])
    source: Any = open_source(f"webdataset:{tmp_path}")
    for row in (0, 4, 1, 3, 2, 0):
        assert source.payload(row) == png(row)
        assert len(source.reading._open) <= 2
    assert np.array_equal(source.first, range(6))


def test_a_folder_of_a_bucket_is_told_from_a_shard_that_is_missing() -> None:
    assert shards._missing("u", "s3://b/photos", "no such object", 1).hint.endswith("s3://b/photos/")
    assert "braces" in shards._missing("u", "s3://b/photos/7.tar", "no such object", 9).hint


def test_train_and_test_share_one_index(tmp_path) -> None:
    write(tmp_path / "a.tar", [(f"{row}.png", png(row)) for row in range(40)])
    train, test = (open_source(f"webdataset:{tmp_path}/a.tar?split={part}&holdout=0.3") for part in ("train", "test"))
    assert len(train) + len(test) == 40
    assert not set(train.ids) & set(test.ids)
    assert test.image(0).size == (4, 4)
