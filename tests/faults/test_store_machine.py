"""Whatever happens to a store, in whatever order: no read ever gives a wrong row, and repair brings everything back.

The model is the store as it must be in the end, byte for byte: every object on the disk is that one's, or harmed.

Not generated: an object replaced by another of the same length with a right checksum, which no read can see
(tests/faults/test_store_damage.py).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import real_store
import torch
import zarr
from hypothesis import HealthCheck, Phase, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kill_driver import Steps, Stopped
from real_store import BAD, BATCH, ITEMS, SHARD, SHARDS, Images, leftovers, objects_of

from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.embedding.repair import repair
from gstds_cache.embedding.reuse import KnownRows
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import (
    ChunkCorruptError,
    GstdsError,
    IncompleteError,
    IntegrityError,
    StoreNotFoundError,
    UsageError,
)
from gstds_cache.store import layout
from gstds_cache.store.access import Kind
from gstds_cache.store.describe import summarise
from gstds_cache.store.format import CURRENT
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.verify import Level, verify
from gstds_cache.store.writer import open_writer

GROWN = Images(ITEMS + 5)
CPU = torch.device("cpu")
RECEIPTS = [CURRENT.commit_key(shard) for shard in range(SHARDS)]
OBJECTS = [layout.object_key(shard) for shard in range(SHARDS)]
SMALL = [layout.GROUP, layout.ITEMS, layout.LABEL, "embeddings/zarr.json", "label/zarr.json", "valid/zarr.json"]
KEYS = [*SMALL, layout.VALID, layout.COMPLETE, *OBJECTS, *RECEIPTS]
shards_of = st.sets(st.integers(0, SHARDS - 1), min_size=1).map(sorted)


@cache
def encoder() -> Encoder:
    return real_store.encoder()


@cache
def manifest_of(count: int) -> DatasetManifest:
    return build_manifest(Images(count))


def embed(where: Path, source: Images, shards: list[int], known: KnownRows | None = None) -> int:
    """What the command does, for those of ``shards`` that are missing, and the end of it if none is left.

    Returns:
        How many images went through the model.
    """
    manifest = manifest_of(len(source))
    spec = CacheSpec(
        items=len(source), items_root=manifest.root, encoder=encoder().spec.to_dict(), dim=encoder().spec.dim,
        dtype="float16", batch_size=BATCH, shard_rows=SHARD,
    )  # fmt: skip
    attributes = {"kind": manifest.kind, "classes": list(manifest.classes), "provenance": {}}
    with open_writer(where, spec, labels=manifest.labels, items=manifest.to_arrow(), attributes=attributes) as writer:
        there = set(writer.recover())
        task = EmbedTask(source, encoder(), writer, device=CPU, workers=0, known=known)
        there |= {commit.shard for commit in task([shard for shard in shards if shard not in there])}
        if len(there) == spec.shards:
            writer.finish()
    return task.clock.images


@dataclass(frozen=True)
class Model:
    """What everything must be in the end.

    Attributes:
        objects: All bytes of the store.
        rows: [N + 5, D] the rows of the grown data set, of which the store's are the first; NaN for the broken one.
    """

    objects: dict[str, bytes]
    rows: np.ndarray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Made once, undisturbed; the rows are read by zarr, and compared with the encoder's own word."""
    folder = tmp_path_factory.mktemp("model")
    embed(folder / "store", Images(), [0, 1, 2])
    embed(folder / "grown", GROWN, [0, 1, 2, 3])
    rows = np.array(zarr.open_group(folder / "grown", mode="r")["embeddings"][:])
    pixels = [encoder().spec.preprocessing.pixels(GROWN.image(row)) for row in range(len(GROWN)) if row != BAD]
    np.testing.assert_allclose(np.delete(rows, BAD, 0), encoder().embed(torch.stack(pixels)).numpy(), atol=1e-3)
    rows[BAD] = np.nan
    objects = objects_of(folder / "store")
    assert sorted(objects) == sorted(KEYS)
    return Model(objects, rows)


@dataclass
class Count:
    stopped: int = 0
    harmed: int = 0


class StoreMachine(RuleBasedStateMachine):
    """One store, its mirror, and a reader that was opened some time ago."""

    def __init__(self, model: Model, count: Count) -> None:
        super().__init__()
        self.model, self.count = model, count
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.folder / "store"
        self.reader: EmbeddingStore | None = None
        self.committed: set[int] = set()

    @initialize(shards=st.sampled_from([[], [0], [0, 2], [1, 2], [0, 1, 2], "all"]), step=st.integers(0, 7))
    def begin(self, shards: list[int] | str, step: int) -> None:
        """Begin at some point of a run; to get there by embedding would take most of the time.

        The next run is killed in one of its first steps, so that kills do not depend on the rules being drawn.
        """
        done = [0, 1, 2] if shards == "all" else shards
        keys = (
            KEYS if shards == "all" else [*SMALL, *(key for shard in done for key in (OBJECTS[shard], RECEIPTS[shard]))]
        )
        for key in keys:
            (self.store / key).parent.mkdir(parents=True, exist_ok=True)
            (self.store / key).write_bytes(self.model.objects[key])
        (self.store / ".lock").touch()
        self.committed = set(done)
        if shards == "all":
            self.kill("mirror", lambda: self.read_all("mirror", partial=False), step, may_add=set())
        else:
            self.kill("embed", lambda: self._embed([0, 1, 2]), step, may_add={0, 1, 2})

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the model

    def look(self) -> tuple[set[int], set[str]]:
        """Shards with a right commit record, and objects that are not what they must be, seen without the package."""
        there = objects_of(self.store)
        right = {key for key, data in there.items() if data == self.model.objects.get(key)}
        shards = {shard for shard in range(SHARDS) if RECEIPTS[shard] in right}
        needed = {*SMALL, *(OBJECTS[shard] for shard in range(SHARDS) if RECEIPTS[shard] in there)}
        if layout.COMPLETE in there:
            needed = set(KEYS)
        # What has no commit record is no part of the store, and VALID none before COMPLETE.
        commits = {key for key in RECEIPTS if key in there}
        return shards, (needed | commits) - right

    @property
    def whole(self) -> bool:
        return (self.store / layout.COMPLETE).exists()

    def require_right(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        assert BAD not in rows
        np.testing.assert_array_equal(embeddings, self.model.rows[rows])

    def read_all(self, kind: Kind, *, partial: bool) -> None:
        reader = EmbeddingStore(self.store, allow_partial=partial, access=kind, memory_budget=0)
        rows = np.flatnonzero(reader.valid == layout.OK)
        assert rows.tolist() == [row for row in range(ITEMS) if row // SHARD in self.look()[0] and row != BAD]
        self.require_right(rows, reader.gather(rows))

    @invariant()
    def the_committed_shards_are_those_that_were_committed(self) -> None:
        shards, harmed = self.look()
        assert shards == self.committed
        if not harmed:
            summary = summarise(self.store)
            assert (summary.committed, summary.complete) == (len(shards), self.whole)

    # ---- what a user does

    def _embed(self, shards: list[int]) -> None:
        try:
            EmbeddingStore(self.store)
        except (IncompleteError, StoreNotFoundError):
            embed(self.store, Images(), shards)

    def _repair(self) -> None:
        self.report = repair(self.store, Images(), encoder(), device="cpu", workers=0)

    @rule(shards=shards_of)
    def embed(self, shards: list[int]) -> None:
        before, harmed = self.look()
        # A store without its group is one whose making was killed, whatever else is there.
        hit = self.whole and (self.store / layout.GROUP).exists()
        try:
            self._embed(shards)
        except IntegrityError:
            assert harmed, "a sound store is refused"
            # A flipped byte shows at the end, when the missing shards are there.
            self.committed = self.look()[0]
            assert before <= self.committed <= before | set(shards)
            return
        except UsageError:
            assert layout.GROUP in harmed
            assert layout.ITEMS in harmed, "begun anew where the first object of all is there"
            self._restore()
            return
        self.committed |= set() if hit else set(shards)
        if not hit:
            assert leftovers(self.store) == []
            if len(self.committed) == SHARDS:
                event("finished")
                assert objects_of(self.store) == self.model.objects

    @rule()
    def repair(self) -> None:
        before, harmed = self.look()
        whole, there = self.whole, objects_of(self.store)
        try:
            self._repair()
        except (IntegrityError, StoreNotFoundError):
            assert layout.GROUP in harmed
            assert {key: data for key, data in objects_of(self.store).items() if there.get(key) != data} == {}
            self._restore()
            self._repair()
        self.committed, left = self.look()
        assert self.committed >= before
        assert self.report.after.problems == ()
        assert not left - set(SMALL), "a shard is not mended"
        if whole and layout.COMPLETE not in harmed:
            event("repaired" if harmed else "nothing to repair")
            assert self.report.after.complete
        if self.report.after.complete:
            assert objects_of(self.store) == self.model.objects
        if layout.GROUP not in left:
            self.read_all("memory", partial=True)

    def _restore(self) -> None:
        """The one object that nothing can be made from comes from a copy, as the error says."""
        (self.store / layout.GROUP).write_bytes(self.model.objects[layout.GROUP])

    @rule(kind=st.sampled_from(["memory", "mirror", "window"]), partial=st.booleans())
    def read(self, kind: Kind, partial: bool) -> None:
        try:
            self.read_all(kind, partial=partial)
            event(f"read by {kind}")
        except GstdsError:
            assert self.look()[1] or not (self.whole or (partial and kind != "mirror")), "a sound store is refused"

    @rule()
    def open_reader(self) -> None:
        try:
            self.reader = EmbeddingStore(self.store, allow_partial=True, access="window", memory_budget=0)
        except GstdsError:
            assert self.look()[1]

    @precondition(lambda self: self.reader is not None)
    @rule(row=st.integers(0, ITEMS - 1))
    def read_from_the_open_reader(self, row: int) -> None:
        """It knows nothing of what happened since."""
        assert self.reader is not None
        try:
            self.require_right(np.array([row]), self.reader.gather(np.array([row])))
        except UsageError:
            assert self.reader.valid[row] != layout.OK
        except ChunkCorruptError:
            shard = row // SHARD
            assert objects_of(self.store).get(OBJECTS[shard]) != self.model.objects[OBJECTS[shard]]

    @rule()
    def restart(self) -> None:
        self.reader = None

    @rule(level=st.sampled_from(["quick", "full"]))
    def verify(self, level: Level) -> None:
        shards, harmed = self.look()
        try:
            report = verify(self.store, level)
        except (IntegrityError, StoreNotFoundError):
            assert layout.GROUP in harmed
            return
        assert harmed or not report.problems, "a sound store is said to be harmed"
        if level == "full" and not report.problems:
            event("verified")
            assert report.committed == len(shards)
            assert not harmed or not self.whole
            self.read_all("memory", partial=True)

    @rule()
    def reuse(self) -> None:
        """Take over what there is into a new store of a grown data set."""
        manifest, where = manifest_of(len(GROWN)), self.folder / "grown"
        try:
            known = KnownRows([self.store], manifest.sha256, encoder().spec.to_dict(), "float16")
            assert embed(where, GROWN, [0, 1, 2, 3], known) == len(GROWN) - known.count
            event(f"reused {known.count}")
            reader = EmbeddingStore(where, access="memory")
            rows = np.flatnonzero(reader.valid == layout.OK)
            assert rows.tolist() == [row for row in range(len(GROWN)) if row != BAD]
            self.require_right(rows, reader.gather(rows))
        except GstdsError:
            assert self.look()[1], "a sound store is not reused"
        finally:
            shutil.rmtree(where, ignore_errors=True)

    # ---- what happens to a user

    @precondition(lambda self: not self.whole)
    @rule(shards=shards_of, step=st.integers(0, 50))
    def kill_embed(self, shards: list[int], step: int) -> None:
        self.kill("embed", lambda: self._embed(shards), step, may_add=set(shards))

    @precondition(lambda self: self.look()[1] or (self.store / layout.REPAIR).exists())
    @rule(step=st.integers(0, 50))
    def kill_repair(self, step: int) -> None:
        self.kill("repair", self._repair, step, may_add=set(range(SHARDS)))

    @precondition(lambda self: self.whole)
    @rule(step=st.integers(0, 35))
    def kill_the_making_of_a_mirror(self, step: int) -> None:
        shutil.rmtree(self.store.with_name("store.mirror"), ignore_errors=True)
        self.kill("mirror", lambda: self.read_all("mirror", partial=False), step, may_add=set())

    def kill(self, what: str, act: Callable[[], object], step: int, may_add: set[int]) -> None:
        """Stop between two steps; nothing after it has any effect."""
        before, harmed = self.look()
        try:
            with Steps(str(self.store), step, "stop").counted() as steps:
                act()
        except Stopped:
            self.count.stopped += 1
            event(f"killed: {what}")
            note(f"stopped {steps.labels[step]}")
        except GstdsError:
            assert harmed
        self.committed = self.look()[0]
        assert self.committed <= before | may_add
        if what == "repair":
            # It undoes only what it makes anew.
            before = {shard for shard in before if OBJECTS[shard] not in harmed}
        assert self.committed >= before

    @rule(key=st.sampled_from([*SMALL, layout.VALID, layout.COMPLETE, layout.REPAIR, *OBJECTS, *OBJECTS, *RECEIPTS]),
          place=st.integers(0, 5000), mask=st.integers(1, 255))  # fmt: skip
    def corrupt(self, key: str, place: int, mask: int) -> None:
        path = self.store / key
        if path.exists():
            data = bytearray(path.read_bytes())
            data[place % len(data)] ^= mask
            path.write_bytes(data)
            self.count.harmed += 1
            self.committed = self.look()[0]

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        self.count.harmed += (self.store / key).exists()
        (self.store / key).unlink(missing_ok=True)
        self.committed = self.look()[0]

    @rule(key=st.sampled_from(RECEIPTS), keep=st.integers(0, 100))
    def cut_off_a_commit(self, key: str, keep: int) -> None:
        if (self.store / key).exists():
            (self.store / key).write_bytes((self.store / key).read_bytes()[:keep])
            self.count.harmed += 1
            self.committed = self.look()[0]


@pytest.mark.parametrize(
    ("examples", "steps"), [(30, 20), pytest.param(200, 40, marks=pytest.mark.faults)], ids=["short", "long"]
)
def test_no_order_of_events_gives_a_wrong_row(model: Model, tally, examples: int, steps: int) -> None:
    count = Count()
    run_state_machine_as_test(
        lambda: StoreMachine(model, count),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    tally.stops += count.stopped
    tally.faults += count.harmed
    # Every example begins with a kill; how many faults follow is Hypothesis's choice, and differs by its version.
    assert count.stopped >= examples
    assert count.harmed > 0
