"""The commands on a bucket: the same bytes as in a directory, whatever the network and other writers do."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from s3_api import stored

from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore

KILLS = 2


@pytest.fixture
def words(image_folder: Path, tiny_model: str, s3_prefix: str) -> list[str]:
    return ["gstds-embed", "imagefolder:photos", "--model", tiny_model, "--cache", s3_prefix, "--batch-size", "4",
            "--shard-rows", "8", "--json"]  # fmt: skip


def local(words: list[str], location: str) -> list[str]:
    return [location if word.startswith("s3://") else word for word in words]


def objects(where: str | Path, *, without: str = "zarr.json") -> dict[str, bytes]:
    """All objects but the group, whose provenance may differ, and COMPLETE, which holds the group's hash."""
    transport = open_transport(Location.parse(where))
    return {key: transport.get(key) for key in transport.sizes() if key not in {without, layout.COMPLETE}}


def test_the_main_job_on_a_bucket(command, result_of, words, s3_server, s3_prefix, tmp_path) -> None:
    done = command(*words)
    assert result_of(done)["store"] == s3_prefix
    assert f"next: gstds-select {s3_prefix}" in done.stdout
    command(*local(words, "photos.store"))
    assert objects(s3_prefix) == objects(tmp_path / "photos.store")
    again = command(*words)
    assert "cache hit" in again.stdout

    select = ["gstds-select", s3_prefix, "--batch-size", "20", "--epochs", "2", "--knn", "5", "--json"]
    select += ["--guidance", "none"]
    selected = result_of(command(*select))
    assert Path(selected["out"]).is_relative_to(tmp_path / "stores")
    assert result_of(command(*select))["cache_hit"]
    small = [*select, "--memory-budget", "0", "--out", "again.arrow"]
    assert "mirror" in command(*small).stderr
    assert (tmp_path / "again.arrow").read_bytes() == Path(selected["out"]).read_bytes()
    train = ["gstds-train", "imagefolder:photos", "--arch", "timm:test_resnet", "--image-size", "16", "--lr", "0.02"]
    command(*train, "--selection", "again.arrow", "--cache", s3_prefix, "--out", "run")

    damaged = bytearray(stored(s3_server, s3_prefix, layout.object_key(1)) or b"")
    damaged[9] ^= 1
    open_transport(Location.parse(s3_prefix)).put(layout.object_key(1), bytes(damaged))
    bad = command("gstds-cache", "verify", s3_prefix, "--level", "full", code=3)
    assert "shard 1: embeddings/c/1/0 hashes to" in bad.stderr
    assert f"gstds-cache repair {s3_prefix}" in bad.stderr
    mended = result_of(command("gstds-cache", "repair", s3_prefix, "--json"))
    assert (mended["shards_made_again"], mended["images"], mended["problems"]) == ([1], 8, [])
    assert objects(s3_prefix) == objects(tmp_path / "photos.store")
    command("gstds-cache", "verify", s3_prefix, "--level", "sample")

    command("gstds-cache", "export", s3_prefix, "rows.npy")
    assert np.load(tmp_path / "rows.npy").shape == (60, 48)
    assert command("gstds-cache", "rm", s3_prefix, code=2).stderr.count("--yes") == 1
    removed = result_of(command("gstds-cache", "rm", s3_prefix, "--yes", "--json"))
    assert removed["objects"] == 8 + 8 + 7 + 1  # shards, commit records, small objects, COMPLETE
    assert stored(s3_server, s3_prefix, "zarr.json") is None
    assert not list((tmp_path / "stores" / "remote").iterdir())


def test_any_zarr_reader_opens_a_bucket(command, words, s3_prefix, s3_server) -> None:
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    command(*words)
    bucket, _, prefix = s3_prefix.removeprefix("s3://").partition("/")
    plain = S3Store(bucket, prefix=prefix, endpoint=s3_server.endpoint, client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(plain, read_only=True), mode="r")
    reader = EmbeddingStore(s3_prefix)
    good = np.flatnonzero(group["valid"][:] == layout.OK)
    assert len(good) == 58
    np.testing.assert_array_equal(group["embeddings"][:][good], reader.gather(good))


def test_a_run_on_a_bucket_that_is_killed_is_finished_by_the_same_command(
    command, start, result_of, words, s3_server, s3_prefix, tmp_path
) -> None:
    slow = [word + "_slow" if word.endswith(":build") else word for word in words]
    (tmp_path / "hold").touch()
    for kill in range(KILLS):
        running = start(*slow)
        while stored(s3_server, s3_prefix, CURRENT.commit_key(2 * kill)) is None:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        running.kill()
        assert running.wait() == -signal.SIGKILL
        running.communicate()
    committed = objects(s3_prefix)
    before = [key for key in committed if key.startswith("commits/")]
    assert KILLS < len(before) < 8
    (tmp_path / "hold").unlink()
    done = result_of(command(*slow))
    assert done["committed_before"] == 8 * len(before)
    assert done["embedded"] == 60 - 8 * len(before)
    command(*local(slow, "photos.store"))
    assert objects(s3_prefix) == objects(tmp_path / "photos.store")
    assert {key: objects(s3_prefix)[key] for key in before} == {key: committed[key] for key in before}


def test_several_writers_at_once_end_with_one_set_of_bytes(command, start, words, s3_prefix, tmp_path) -> None:
    writers = [start(*words) for _ in range(3)]
    ends = [(writer.communicate(timeout=120), writer.returncode) for writer in writers]
    assert [code for _, code in ends] == [0, 0, 0], ends
    command(*local(words, "photos.store"))
    assert objects(s3_prefix) == objects(tmp_path / "photos.store")
    command("gstds-cache", "verify", s3_prefix, "--level", "full")


def test_a_bad_network_costs_nothing_but_time(command, result_of, words, faulty_s3, tmp_path) -> None:
    location, proxy = faulty_s3
    words = [location if word.startswith("s3://") else word for word in words]
    faults = [
        proxy.inject("slow_down", method="PUT", times=4),
        proxy.inject("reset", method="GET", times=3, after=2),
        proxy.inject("lose", method="PUT", key="/commits/", times=3, after=1),
        proxy.inject("lose", method="PUT", key="/embeddings/c/", times=2, after=2),
        proxy.inject("lose", method="PUT", key="/COMPLETE.json"),
    ]
    assert result_of(command(*words))["embedded"] == 60
    assert [fault.hits for fault in faults] == [4, 3, 3, 2, 1]
    command(*local(words, "photos.store"))
    assert objects(location) == objects(tmp_path / "photos.store")
