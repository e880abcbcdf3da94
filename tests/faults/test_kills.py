"""Killed at any moment, the same run again ends with the bytes of a run that nothing disturbed, and repeats nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from forked import FORKS, Forked
from kill_driver import Driver, kinds
from real_store import BAD, ITEMS, SHARD, SHARDS, committed_shards, files_of, leftovers, objects_of, stamps

from gstds_cache.config import EmbedConfig
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.errors import GstdsError
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore

ROWS = {shard: len(range(shard * SHARD, min((shard + 1) * SHARD, ITEMS))) for shard in range(SHARDS)}
GOOD = np.array([row for row in range(ITEMS) if row != BAD])
LONG = pytest.param("all", marks=pytest.mark.faults)


def finish_and_compare(driver: Driver, store: Path, reference: Path) -> None:
    """The same run again: it does what is missing and no more, and nobody sees that there was a kill."""
    before, there = stamps(store), committed_shards(store)
    missing = [shard for shard in range(SHARDS) if shard not in there]
    again = driver.run("embed", store)
    assert again.code == 0
    assert again.result == {"images": sum(ROWS[shard] for shard in missing), "shards": missing}
    assert objects_of(store) == objects_of(reference)
    assert leftovers(store) == []
    assert stamps(store, there) == before


def never_wrong(store: Path, reference: Path) -> None:
    """A killed run's store is refused, or what can be read of it is right."""
    expected = EmbeddingStore(reference, access="memory").gather(GOOD)
    for partial in (False, True):
        try:
            reader = EmbeddingStore(store, allow_partial=partial, access="memory")
            there = reader.valid[GOOD] == layout.OK
            np.testing.assert_array_equal(reader.gather(GOOD[there]), expected[there])
        except GstdsError:
            continue


def points(steps: tuple[str, ...], how_many: str, rng, some: int = 5) -> list[int]:
    """All steps; or some of the making of the store, of the shards and of the end."""
    if how_many == "all":
        return list(range(len(steps)))
    cuts = [0, steps.index("after rename zarr.json"), steps.index("before open valid/c/.0.PID.tmp"), len(steps)]
    return [point for low, high in pairwise(cuts) for point in sorted(rng.sample(range(low, high), some))]


@pytest.fixture
def steps(driver: Driver, tmp_path: Path) -> tuple[str, ...]:
    """The steps of a run that nothing disturbs."""
    outcome = driver.run("embed", tmp_path / "counted")
    assert outcome.result["images"] == ITEMS
    return outcome.steps


@pytest.mark.parametrize("how_many", ["some", LONG])
def test_a_kill_at_any_step_of_a_run_costs_only_what_was_not_committed(
    driver, steps, reference, tmp_path, tally, how_many
) -> None:
    assert {f"{when} {what}" for when in ("before", "after") for what in
            ("open", "write", "fsync", "rename", "link", "unlink", "mkdir")} < kinds(steps)  # fmt: skip
    chosen = points(steps, how_many, tally.rng("steps"))
    states = set()
    for point in chosen:
        store = tmp_path / f"s{point}"
        assert driver.run("embed", store, point).killed, steps[point]
        tally.kills += 1
        states.add((tuple(objects_of(store)) if store.exists() else (), tuple(leftovers(store))))
        never_wrong(store, reference) if (store / layout.GROUP).exists() else None
        finish_and_compare(driver, store, reference)
        shutil.rmtree(store)
    assert len(states) > len(chosen) / 6, "the kills met the same state again and again"
    assert any(state for _, state in states), "no kill left anything behind"


@pytest.mark.parametrize("trials", [3, pytest.param(40, marks=pytest.mark.faults)])
def test_several_kills_in_a_row(driver, steps, reference, tmp_path, tally, trials) -> None:
    rng = tally.rng("in a row")
    kills = []
    for trial in range(trials):
        store = tmp_path / f"s{trial}"
        kills.append(0)
        # The later kills meet shorter runs: some ends before its kill comes.
        while driver.run("embed", store, rng.randrange(len(steps) // 3)).killed and kills[-1] < 8:
            kills[-1] += 1
        finish_and_compare(driver, store, reference)
    tally.kills += sum(kills)
    assert max(kills) > 1


@pytest.mark.parametrize("how_many", ["some", LONG])
def test_a_kill_of_a_repair_is_finished_by_repair(driver, reference, fresh_copy, tally, how_many) -> None:
    def damaged() -> Path:
        store = fresh_copy()
        data = bytearray((store / layout.object_key(0)).read_bytes())
        data[40] ^= 1
        (store / layout.object_key(0)).write_bytes(data)
        (store / layout.object_key(1)).unlink()
        (store / layout.LABEL).write_bytes(b"damaged")
        return store

    steps = driver.run("repair", damaged()).steps
    chosen = range(len(steps)) if how_many == "all" else sorted(tally.rng("repair").sample(range(len(steps)), 8))
    committed = set()
    for point in chosen:
        store = damaged()
        untouched = stamps(store, [2])
        assert driver.run("repair", store, point).killed, steps[point]
        tally.kills += 1
        committed.add(tuple(committed_shards(store)))
        never_wrong(store, reference)
        mended = driver.run("repair", store)
        assert set(mended.result.get("shards", [9])) <= {0, 1}
        assert objects_of(store) == objects_of(reference), steps[point]
        assert leftovers(store) == []
        assert driver.run("embed", store).result == {"images": 0, "shards": []}
        assert stamps(store, [2]) == untouched
        shutil.rmtree(store)
    assert len(committed) > 1


@pytest.mark.parametrize("how_many", ["some", LONG])
def test_a_kill_of_the_making_of_a_mirror_leaves_no_wrong_mirror(
    driver, reference, fresh_copy, tally, how_many
) -> None:
    store = fresh_copy()
    made = driver.run("mirror", store)
    chosen = made.steps if how_many == "all" else tally.rng("mirror").sample(made.steps, 6)
    folder = store.with_name(store.name + ".mirror")
    expected = EmbeddingStore(reference, access="memory").gather(GOOD)
    for point in [made.steps.index(step) for step in chosen]:
        shutil.rmtree(folder)
        assert driver.run("mirror", store, point).killed, made.steps[point]
        tally.kills += 1
        np.testing.assert_array_equal(EmbeddingStore(store, access="mirror").gather(GOOD), expected)
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "embeddings.npy", "mirror.json"]
    assert objects_of(store) == objects_of(reference)


@pytest.mark.parametrize("how", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("how_many", ["some", LONG])
def test_a_disk_that_fails_at_any_step_is_an_error_that_says_so_and_the_same_run_again_completes(
    driver, steps, reference, tmp_path, tally, how, how_many
) -> None:
    chosen = points(steps, how_many, tally.rng(how), some=3)
    passed = []
    for point in chosen:
        store = tmp_path / f"s{point}"
        broken = driver.run("embed", store, point, how)
        tally.faults += 1
        assert broken.code == 0
        if "error" not in broken.result:
            passed.append(steps[point])
        else:
            assert broken.result["errno"] == getattr(errno, how), broken.result
            assert str(store) in broken.result["message"]
        finish_and_compare(driver, store, reference)
        shutil.rmtree(store)
    # mkdir of a folder that is there after all is no failure; everything else is.
    assert [step for step in passed if "mkdir" not in step] == []


def test_a_disk_that_is_really_full(driver, reference, tmp_path, tally) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        full = driver.run("embed", disk / "store")
        tally.faults += 1
        assert full.result.get("error") == "IncompleteError"
        assert "the disk is full" in full.result["message"]
        committed = len(committed_shards(disk / "store"))
        assert committed > 0
        assert f"{committed} of the " in full.result["message"]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        finish_and_compare(driver, disk / "store", reference)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_every_object_is_on_the_disk_before_anything_counts_on_it(steps) -> None:
    """What a crash of the whole machine would take: contents and names that were not flushed when they were relied on.

    Flushing a file makes its bytes durable, flushing a directory the names in it. When a commit record, the group or
    COMPLETE gets its name, all files and names that were made before must be.
    """
    waiting: set[str] = set()  # contents as "=path", names as "path"
    promises = 0
    for step in steps:
        when, operation, path = step.split(" ") if step.count(" ") == 2 else (step, "", "")
        name = path.replace("/.", "/").removeprefix(".").removesuffix(".PID.tmp") if path.endswith(".tmp") else path
        if when == "before" and operation in {"rename", "link"} and not path.endswith(".tmp"):
            assert f"={path}" not in waiting, f"{path} gets its name before its bytes are flushed"
            if path.startswith("commits/") or path in {layout.GROUP, layout.COMPLETE}:
                promises += 1
                assert waiting == set(), f"{step}, and not durable are {waiting}"
        elif when == "after" and operation == "write":
            waiting.add(f"={name}")
        elif when == "after" and operation == "fsync":
            waiting.discard(f"={name}")
            waiting -= {made for made in waiting if made[0] != "=" and str(Path(made).parent) == (path or ".")}
        elif when == "after" and operation in {"rename", "link", "mkdir"} and path:
            waiting.add(path)
    assert promises == SHARDS + 2
    assert waiting == set()


# ---- the real command, killed by the clock


WORDS = ["imagefolder:photos", "--cache", "photos.store", "--batch-size", "4", "--shard-rows", "8", "--workers", "1",
         "--device", "cpu", "--json"]  # fmt: skip
SHARDS_OF_PHOTOS = 8


@dataclass
class Command:
    """``gstds-embed`` as a process group of its own: the run, and the worker that decodes.

    Attributes:
        forked: Whether it is forked from a process with everything loaded.
    """

    folder: Path
    model: str
    groups: list[int] = field(default_factory=list)
    forked: bool = False

    @property
    def store(self) -> Path:
        return self.folder / "photos.store"

    def start(self) -> subprocess.Popen[str] | Forked:
        environment = os.environ | {"GSTDS_CACHE": str(self.folder / "stores")}
        if self.forked:
            words = ["gstds-embed", *WORDS, "--model", self.model]
            forked = FORKS.start(words, cwd=self.folder, env=environment, new_session=True)
            self.groups.append(forked.pid)
            return forked
        # In a job that a shell put into the background Ctrl-C is ignored, and children inherit that.
        process = subprocess.Popen(
            [
                "env",
                "--default-signal=INT",
                Path(sys.executable).with_name("gstds-embed"),
                *WORDS,
                "--model",
                self.model,
            ],
            cwd=self.folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.groups.append(process.pid)
        return process

    def in_use(self, process: subprocess.Popen[str] | Forked, committed: int = 0) -> None:
        """Wait until the run has a store, and so many shards in it, or has ended."""
        deadline = time.monotonic() + 120
        while process.poll() is None and not (
            (self.store / layout.GROUP).exists() and len(committed_shards(self.store)) >= committed
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def alive(self, group: int | None = None) -> list[int]:
        """Processes of one group, or of all, that still run."""
        groups = self.groups if group is None else [group]
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
                if int(of) in groups and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    def gone_within(self, seconds: float, group: int | None = None) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive(group):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def finish_and_compare(self, expected: dict[str, bytes]) -> None:
        before, committed = stamps(self.store), min(8 * len(committed_shards(self.store)), 60)
        process = self.start()
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        said = json.loads(out.splitlines()[-1])
        assert (said["committed_before"], said["embedded"]) == (committed, 60 - committed)
        assert objects_of(self.store) == expected
        assert leftovers(self.store) == []
        assert {key: stamp for key, stamp in stamps(self.store).items() if key in before} == before


@pytest.fixture
def embedding(image_folder, tiny_model, tmp_path, monkeypatch) -> Iterator[tuple[Command, dict[str, bytes]]]:
    """The command, and what it makes where nothing disturbs it."""
    model = tiny_model.replace(":build", ":build_slow")
    monkeypatch.chdir(tmp_path)
    config = EmbedConfig(model=model, batch_size=4, shard_rows=8, workers=0, device="cpu")
    embed_dataset(open_source("imagefolder:photos"), config, where="reference")
    running = Command(tmp_path, model)
    yield running, objects_of(tmp_path / "reference")
    for pid in running.alive():
        os.kill(pid, signal.SIGKILL)


def kill(process: subprocess.Popen[str] | Forked) -> bool:
    """Kill the run alone: its decode worker has to see by itself that there is no one left to work for."""
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode in {-signal.SIGKILL, 0}
    return process.returncode != 0  # 0: it was done before


def interrupt(process: subprocess.Popen[str] | Forked, command: Command) -> bool:
    """Ctrl-C, as a terminal sends it: to the whole group."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode in {0, -signal.SIGINT} and (command.store / layout.COMPLETE).exists():
        return False  # it was done before
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors, errors
    assert command.gone_within(2, process.pid), "a worker outlives the run"
    return True


@pytest.mark.parametrize("chains", [1, pytest.param(12, marks=pytest.mark.faults)])
def test_the_command_stopped_at_random_moments_goes_on_where_it_was(embedding, tally, chains) -> None:
    command, expected = embedding
    rng = tally.rng("clock")
    states, kills, interrupts = set(), 0, 0
    hold = command.folder / "hold"
    if chains == 1:  # one chance is all there is: the run waits for it
        hold.touch()
        command.forked = True  # the long test stops it while Python starts as well
    for _ in range(chains):
        shutil.rmtree(command.store, ignore_errors=True)
        committed: dict[str, tuple[int, int]] = {}
        stops = (
            [interrupt, kill, kill] if chains == 1 else rng.choices([kill, interrupt], [3, 1], k=rng.randrange(1, 5))
        )
        for planned in stops:
            shards = len(committed_shards(command.store))
            # Ctrl-C comes when there is work to interrupt: while Python starts or ends, the answer is Python's own.
            stop = kill if shards > 4 else planned
            process = command.start()
            if stop is kill and chains > 1 and rng.random() < 0.2:
                time.sleep(rng.uniform(0, 4))  # it may not have come to its work
            else:
                more = 1 if chains == 1 or stop is interrupt else rng.randrange(3)
                command.in_use(process, min(shards + more, SHARDS_OF_PHOTOS - 1))
                time.sleep(rng.uniform(0, 0.05 if stop is interrupt else 0.1))
            stopped = stop(process) if stop is kill else stop(process, command)
            if not stopped:
                break
            kills += stop is kill
            interrupts += stop is interrupt
            states.add(tuple(files_of(command.store)) if command.store.exists() else ())
            now = stamps(command.store)
            assert {key: now.get(key) for key in committed} == committed
            committed = now
        hold.unlink(missing_ok=True)
        command.finish_and_compare(expected)
    tally.kills += kills
    tally.faults += interrupts
    assert kills >= chains
    assert interrupts
    assert len(states) > (1 if chains == 1 else 5)
    assert command.gone_within(20), "a decode worker outlives the run that it worked for"
