"""A place's name, parsed once: nothing that is typed makes a folder named `~`, `s3:` or `file:`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from gstds_cache.errors import UsageError
from gstds_cache.files.derived import cache_root, derived_paths, find_cache_root, first_writable, hashes_folder, keep
from gstds_cache.files.location import Location, expanded, file_to_write, local_file


def test_paths_and_urls_are_what_they_say(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, place in (
        ("a/b", Path("a/b")),
        ("./s3:/a", Path("s3:/a")),
        ("a:/b", Path("a:/b")),
        ("photos:v2/x", Path("photos:v2/x")),
        ("~", Path("/home/me")),
        ("~/x", Path("/home/me/x")),
        ("./~/x", Path("~/x")),
        ("x~", Path("x~")),
        ("file:///a%20b", Path("/a b")),
        ("FILE:///a", Path("/a")),
        ("file:/a", Path("/a")),
        (Path("a"), Path("a")),
    ):
        location = Location.parse(text)
        assert location == Location(place), text
        assert Location.parse(location) is location
        assert str(location) == str(place)
    for text in ("s3://bucket/p/q", "S3://bucket/p/q", "s3://bucket/p/q/"):
        location = Location.parse(text)
        assert location == Location(None, "bucket", "p/q")
        assert (str(location), location.name) == ("s3://bucket/p/q", "q")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:/bucket/p", "did you mean 's3://bucket/p'?"),
        ("S3:/bucket", "did you mean 's3://bucket'?"),
        (Path("s3://bucket/p"), "did you mean 's3://bucket/p'?"),
        ("gs://bucket", "expected a path, file:///path or s3://bucket/prefix"),
        ("http:/host/x", "did you mean 'http://host/x'?"),
        ("file://host/x", "expected file:///absolute/path"),
        ("file://", "expected file:///absolute/path"),
        ("", "expected a path"),
        ("~nobodyatall/x", "no user 'nobodyatall' is known here"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Location.parse(text)
    assert words in str(caught.value)


NO_PATHS = """
from pathlib import Path
import numpy as np
from gstds_cache.api.cache import describe_store, list_stores, remove_store
from gstds_cache.errors import UsageError
from gstds_cache.files.location import Location, file_to_write, local_file

for value in (3, 1.5, b"x", ["a"], None, np.zeros(2), object()):
    got = "None" if value is None else type(value).__name__
    calls = [(parse, "`cache`") for parse in (Location.parse, local_file, file_to_write)]
    for call, name in [*calls, (describe_store, "`store`"), (remove_store, "`store`")]:
        try:
            call(value, name) if name == "`cache`" else call(value)
        except UsageError as error:
            assert str(error).startswith(f"{name}: got {got}, expected a path"), error
        else:
            raise AssertionError((call, value))
assert not list(Path().iterdir())
"""


def test_only_a_path_names_a_place(tmp_path: Path) -> None:
    """As a user calls it: the tests' own check of types would refuse these first."""
    subprocess.run([sys.executable, "-c", NO_PATHS], cwd=tmp_path, check=True)


def test_an_open_store_and_any_path_like_name_their_place() -> None:
    place = Location(Path("a"))
    assert Location.parse(SimpleNamespace(location=place)) is place
    assert Location.parse(PurePosixPath("a")) == place
    assert local_file(PurePosixPath("a"), "`out`") == Path("a")


def test_an_absolute_location_is_still_called_what_was_typed(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    location = Location.parse("a").absolute()
    assert location == Location(tmp_path / "a")
    assert str(location) == "a"
    assert location.absolute() is location


def test_a_file_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`file`: .* is a folder"):
        file_to_write(tmp_path, "`file`")
    with pytest.raises(UsageError, match=f"`file`: .* no folder {tmp_path}/no"):
        file_to_write(tmp_path / "no" / "x.npy", "`file`")
    assert file_to_write(tmp_path / "x.npy", "`file`") == tmp_path / "x.npy"


def test_where_a_file_is_expected_a_bucket_is_refused() -> None:
    for text in ("s3://bucket/x.arrow", "S3://b/x", "s3:/b/x", "grpc:/host:1"):
        with pytest.raises(UsageError, match=r"`out`: got .* expected a path on this machine"):
            local_file(text, "`out`")
    assert local_file("file:///tmp/x", "`out`") == Path("/tmp/x")


def test_without_a_home_only_what_needs_one_says_so(monkeypatch, tmp_path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GSTDS_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert find_cache_root() is None
    assert hashes_folder() is None
    assert derived_paths(Location(tmp_path / "s"), ".mirror") == [tmp_path / "s.mirror"]
    assert derived_paths(Location.parse("s3://bucket/s"), ".mirror") == []
    with pytest.raises(UsageError, match="GSTDS_CACHE and HOME are not set") as caught:
        cache_root("--cache STORE")
    assert "give --cache STORE, or set GSTDS_CACHE" in str(caught.value)
    assert first_writable([]).note == keep(lambda _path: None, []).note == "GSTDS_CACHE and HOME are not set"
    monkeypatch.setattr(Path, "expanduser", lambda _self: nobody())
    with pytest.raises(UsageError, match="HOME is not set"):
        expanded("~/x")


def test_derived_folders_of_one_store_have_one_place_however_it_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "link").symlink_to("s")
    last = {
        derived_paths(Location.parse(name), ".m")[-1].name.split("-")[-1]
        for name in ("s", "./s", tmp_path / "s", "link", "x/../s", (tmp_path / "s").as_uri())
    }
    assert len(last) == 1
    paths = {name: derived_paths(Location.parse(name), ".m") for name in ("t", "u/t", "s3://bu/s/", "S3://bu/s")}
    assert paths["t"][-1] != paths["u/t"][-1]
    assert paths["s3://bu/s/"] == paths["S3://bu/s"]


WORDS = {
    "gstds-embed": [["digits", "--cache", "{}"], ["digits", "--cache", "a", "--reuse", "{}"], ["imagefolder:{}"],
                    ["torchvision:CIFAR10?root={}"], ["digits", "--model", "timm:resnet18?weights={}", "--cache", "a"]],
    "gstds-select": [["{}"], ["a", "--out", "{}"], ["a", "--mirror", "{}"], ["a", "--guidance", "file:{}"],
                     ["a", "--schedule", "file:{}"], ["a", "--serve", "localhost:0", "--token-file", "{}"]],
    "gstds-train": [["digits", "--selection", "{}"], ["digits", "--selection", "a", "--out", "{}"],
                    ["digits", "--selection", "a", "--cache", "{}"], ["{}", "--selection", "a"]],
    "gstds-cache": [["ls", "{}"], ["info", "{}"], ["rm", "{}", "--yes"], ["export", "{}", "x.npy"],
                    ["export", "a", "{}"], ["export", "a", "x.arrow", "--scores", "{}"], ["report", "{}"],
                    ["report", "a", "--out", "{}"], ["report", "a", "--cache", "{}"]],
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_no_command_makes_a_folder_of_such_a_name(name: str, tmp_path: Path, monkeypatch) -> None:
    from importlib.metadata import entry_points

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    (point,) = entry_points(group="console_scripts", name=name)
    for place in ("~nobodyatall/x", "s3:/bucket/x", "gs://bucket/x"):
        for words in WORDS[name]:
            done = CliRunner().invoke(point.load(), [word.format(place) for word in words])
            assert done.exit_code == 2, (place, words, done.output, done.exception)
            assert isinstance(done.exception, SystemExit), (place, words, done.exception)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
