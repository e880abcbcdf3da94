"""``shard=I/N``: several processes embed into one store, each a part of it, and end with the store that one makes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from images import ArraySource
from real_store import leftovers

from gstds_cache.config import EmbedConfig
from gstds_cache.costs.records import recall_store
from gstds_cache.embedding.part import Part, finish_if_last, parse_part
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import UsageError
from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import StoreMetadata

SHARDS, PARTS, FIRST = 15, 3, (0, 5, 10)
HOLD = """
import sys, time
from pathlib import Path
from gstds_cache.files.lock import {kind}
with {kind}(Path(sys.argv[1]), of=Path("it")):
    print("held", flush=True)
    time.sleep(60)
"""


def held(store: Path, kind: str) -> subprocess.Popen[str]:
    """Another process that holds the store's lock."""
    words = [sys.executable, "-c", HOLD.format(kind=kind), str(store / ".lock")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def objects(where: str | Path) -> dict[str, bytes]:
    """All objects but the group, whose provenance may differ, and COMPLETE, which holds the group's hash."""
    transport = open_transport(Location.parse(where))
    return {key: transport.get(key) for key in transport.sizes() if key not in {layout.GROUP, layout.COMPLETE}}


@pytest.fixture(params=["directory", pytest.param("bucket", marks=pytest.mark.faults)])
def where(request: pytest.FixtureRequest) -> str:
    return "photos.store" if request.param == "directory" else str(request.getfixturevalue("s3_prefix"))


@pytest.fixture
def words(image_folder: Path, tiny_model: str, where: str) -> list[str]:
    """60 images, 15 shards; "slow" holds each process after eleven passes while there is a file "hold"."""
    return ["gstds-embed", "imagefolder:photos", "--model", f"{tiny_model}_slow", "--cache", where, "--batch-size", "1",
            "--shard-rows", "4", "--workers", "0", "--json"]  # fmt: skip


@pytest.fixture
def config(tiny_model: str) -> EmbedConfig:
    return EmbedConfig(model=tiny_model, batch_size=4, shard_rows=8, workers=0, device="cpu")


def part_of(config: EmbedConfig, shard: str, **other) -> EmbedConfig:
    return EmbedConfig(**{**vars(config), **other, "shard": shard})


def test_three_processes_one_of_them_killed_end_with_the_store_of_one(
    command, start, result_of, words, where, tmp_path
) -> None:
    (tmp_path / "hold").touch()
    running = [start(*words, "--shard", f"{number}/{PARTS}") for number in range(PARTS)]
    location = Location.parse(where if where.startswith("s3://") else tmp_path / where)
    transport, begun = open_transport(location), time.monotonic()
    while not all(transport.exists(f"commits/{shard}.json") for shard in FIRST):
        assert all(process.poll() is None for process in running), [process.communicate() for process in running]
        assert time.monotonic() - begun < 100
        time.sleep(0.02)
    running[1].kill()
    assert running[1].wait() == -signal.SIGKILL
    running[1].communicate()
    there = {key: data for key, data in objects(location).items() if key.startswith("commits/")}
    (tmp_path / "hold").unlink()
    for process in (running[0], running[2]):
        out, errors = process.communicate(120)
        assert process.returncode == 0, errors
    assert f"of {SHARDS}, being embedded by others or not begun" in out
    assert not transport.exists(layout.COMPLETE)

    last = command(*words, "--shard", f"1/{PARTS}")
    result = result_of(last)
    assert 0 < result["committed_before"] < 20
    assert result["embedded"] == 20 - result["committed_before"], "no committed row is computed again"
    assert (result["shard"], result["part_shards"], result["shards_left"]) == ("1/3", 5, 0)
    assert "next: gstds-select" in last.stdout
    command(*[str(tmp_path / "alone.store") if word == where else word for word in words])
    assert objects(location) == objects(tmp_path / "alone.store")
    assert {key: objects(location)[key] for key in there} == there
    command("gstds-cache", "verify", where, "--level", "full")
    if location.path is not None:
        assert leftovers(location.path) == []
    assert "cache hit" in command(*words).stdout


def test_the_command_without_a_part_finishes_whatever_is_left(config, tmp_path) -> None:
    alone = embed_dataset(ArraySource(60, bad=frozenset({3})), config, where=tmp_path / "alone")
    for shard, left, ok in (("1/3", 5, 24), ("2/3", 2, 20)):
        store = embed_dataset(ArraySource(60, bad=frozenset({3})), part_of(config, shard), where=tmp_path / "s")
        assert store.report is not None
        assert (store.report.shards_left, store.report.ok) == (left, ok)
        assert not (tmp_path / "s" / layout.COMPLETE).exists()
    store = embed_dataset(ArraySource(60, bad=frozenset({3})), config, where=tmp_path / "s")
    assert (store.report.embedded, store.report.committed_before, store.report.shards_left) == (16, 44, 0)
    assert store.report.quarantined == alone.report.quarantined
    assert objects(tmp_path / "s") == objects(tmp_path / "alone")


def test_processes_that_end_at_the_same_time_write_one_complete(start, command, words, where, tmp_path) -> None:
    command(*words)
    transport = open_transport(Location.parse(where if where.startswith("s3://") else tmp_path / where))
    complete, before = transport.get(layout.COMPLETE), objects(transport.location)
    transport.delete(layout.COMPLETE)
    running = [start(*words, "--shard", f"{number}/{PARTS}") for number in range(PARTS)]
    ends = [(process.communicate(120), process.returncode) for process in running]
    assert [code for _, code in ends] == [0] * PARTS, ends
    assert transport.get(layout.COMPLETE) == complete
    assert objects(transport.location) == before


@pytest.mark.parametrize("where", ["directory"], indirect=True)
def test_a_command_that_ends_while_another_finishes_the_store_ends_well(command, result_of, words, tmp_path) -> None:
    command(*words)
    (tmp_path / "photos.store" / layout.COMPLETE).unlink()
    other = held(tmp_path / "photos.store", "exclusive")
    try:
        ended = command(*words, "--shard", "0/2")
    finally:
        end(other)
    assert "shards left: 0, and another process is finishing the store" in ended.stdout
    assert "next: gstds-select" not in ended.stdout
    assert result_of(ended)["complete"] is False
    ended = command(*words, "--shard", "0/2")
    assert "next: gstds-select" in ended.stdout
    assert result_of(ended)["complete"] is True


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_who_is_not_the_last_leaves_the_end_to_the_others(config, tmp_path, kind) -> None:
    embed_dataset(ArraySource(60), config, where=tmp_path / "s")
    (tmp_path / "s" / layout.COMPLETE).unlink()
    other, told = held(tmp_path / "s", kind), list[str]()
    try:
        store = embed_dataset(ArraySource(60), part_of(config, "0/2"), where=tmp_path / "s", notify=told.append)
    finally:
        end(other)
    assert (store.report.shards_left, store.report.complete) == (0, False)
    assert [line for line in told if "another process finishes the store" in line]
    assert not (tmp_path / "s" / layout.COMPLETE).exists()
    finish_if_last(StoreMetadata(tmp_path / "s"), lambda *_: None, told.append)
    assert (tmp_path / "s" / layout.COMPLETE).exists()


def test_a_run_alone_and_a_part_keep_each_other_out(config, tmp_path) -> None:
    embed_dataset(ArraySource(60), part_of(config, "0/2"), where=tmp_path / "s")
    for kind, asked in (("shared", config), ("exclusive", part_of(config, "1/2"))):
        other = held(tmp_path / "s", kind)
        with pytest.raises(Exception, match="is being written by another process"):
            embed_dataset(ArraySource(60), asked, where=tmp_path / "s")
        end(other)


def test_a_live_temporary_of_another_machine_is_left_alone_until_nobody_shares(config, tmp_path) -> None:
    embed_dataset(ArraySource(60), part_of(config, "0/2"), where=tmp_path / "s")
    theirs = tmp_path / "s" / "commits" / ".7.json.4194304-0123abcd.tmp"  # no process here has this number
    theirs.touch()
    shared = open_transport(Location(tmp_path / "s"), shared=True)
    with shared.lock():
        assert shared.collect_temporaries() == 0
    assert theirs.exists()
    embed_dataset(ArraySource(60), part_of(config, "1/2"), where=tmp_path / "s")
    assert not theirs.exists()


@pytest.mark.parametrize(
    ("source", "other", "field"),
    [
        (ArraySource(60, seed=1), {}, "items_root"),
        (ArraySource(59), {}, "items: the store has 60"),
        (ArraySource(60), {"dtype": "float32"}, "dtype: the store has 'float16'"),
        (ArraySource(60), {"shard_rows": 4}, "shard_rows: the store has 8"),
        (ArraySource(60), {"max_pixels": 10_000}, "max_pixels"),
    ],
)
def test_a_part_of_something_else_is_refused_by_its_fingerprint(config, tmp_path, source, other, field) -> None:
    embed_dataset(ArraySource(60), part_of(config, "0/2"), where=tmp_path / "s")
    before = objects(tmp_path / "s")
    with pytest.raises(Exception, match=field) as caught:
        embed_dataset(source, part_of(config, "1/2", **other), where=tmp_path / "s")
    assert type(caught.value).__name__ == "FingerprintMismatchError"
    assert objects(tmp_path / "s") == before


def test_the_cost_is_that_of_all_parts(command, image_folder, tiny_model, tmp_path) -> None:
    words = ["gstds-embed", "imagefolder:photos", "--model", tiny_model, "--cache", "s", "--shard-rows", "16"]
    for number in (1, 0):
        command(*words, "--shard", f"{number}/2")
    cost = recall_store(tmp_path / "s")
    assert cost is not None
    assert cost.samples == 60
    assert [path.name for path in tmp_path.glob(".*.lock")] == []


def test_a_dry_run_is_of_the_part(command, result_of, image_folder, tiny_model) -> None:
    words = ["gstds-embed", "imagefolder:photos", "--model", tiny_model, "--cache", "s", "--shard-rows", "16"]
    told = result_of(command(*words, "--shard", "3/4", "--dry-run", "--json"))
    assert (told["items"], told["images"], told["committed"]) == (60, 12, 0)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 40, 1000])
def test_parts_are_every_shard_once_and_alike(total: int) -> None:
    for count in (1, 2, 3, 7, 41):
        parts = [Part(number, count).shards(total) for number in range(count)]
        assert list(chain(*parts)) == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["3/3", "0/0", "-1/3", "1", "1/", "a/b", "1/3/2", "1 / 3", "", "1/2.0"])
def test_what_is_no_part_is_refused_before_anything_else(no_type_checks, config, tmp_path, text: str) -> None:
    with pytest.raises(UsageError, match="`shard`: got .* expected I/N, with I from 0 to N - 1") as caught:
        embed_dataset(ArraySource(60), part_of(config, text), where=tmp_path / "s")
    if text == "3/3":
        assert caught.value.hint == "parts are counted from 0: the last of 3 is `shard=2/3`"
    assert parse_part("2/3") == Part(2, 3)
    assert parse_part(None) is None
