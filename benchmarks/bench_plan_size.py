"""What a hundred million rows take where no image is read: manifest, plan, commit records.

    python benchmarks/bench_plan_size.py [--rows 1000000 10000000 100000000] [--units 100 1000 10000 100000]

``manifest`` and ``plan`` run the code that a data set of so many items goes through, on synthetic names, hashes and
labels: the Merkle root, the file of items written and read back, the search for equal names; and a selection's plan of
ten epochs, every batch of one epoch drawn in either order. ``driver`` commits so many shards to a store whose objects
are made up when they are asked for, and finishes it: what the process that finishes a store holds for each shard.
Each measurement is a process of its own; memory is what it rises by. ``at_a_billion`` follows from these by
multiplication, with the prices that are printed beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from bench_memory import Watch, status
from harness import parser, report

from gstds_cache.data import names as names_module
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.names import AT_ONCE, Names, duplicate
from gstds_cache.files import mapped
from gstds_cache.files.location import Location
from gstds_cache.selection.order import parse_order
from gstds_cache.selection.plan import SelectionPlan
from gstds_cache.selection.rows import EligibleRows
from gstds_cache.selection.schedule import parse_schedule
from gstds_cache.store import layout
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import StoreWriter

DIM, ITEM_BYTES, SHARD_ROWS = 1280, 2, 1600
EPOCHS, BATCH = 10, 512
BILLION = 10**9
# US dollars, Amazon S3 Standard in us-east-1: PUT and LIST, GET and HEAD per request; storage per GB and month.
PRICES = {"put": 5e-6, "get": 4e-7, "gb_month": 0.023}


class Steps:
    """Time and memory of one step after the other."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        start, watch, begun, used = status("VmRSS"), Watch(), time.perf_counter(), time.process_time()
        result = work()
        self.found[name] = {
            "seconds": round(time.perf_counter() - begun, 2),
            "cpu_seconds": round(time.process_time() - used, 2),
            "anonymous_MB": round(watch.rise() / 1e6, 3),
            "with_mapped_pages_MB": round((status("VmHWM") - start) / 1e6, 1),
        }
        print(name, self.found[name], file=sys.stderr, flush=True)
        return result


def synthetic_names(rows: int) -> Names:
    """Row numbers of ten digits, ascending, written to the file of :class:`Names` without a Python object for each."""
    powers, offsets = 10 ** np.arange(9, -1, -1), np.arange(AT_ONCE + 1, dtype=np.int32) * 10

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_file(file, names_module._SCHEMA) as writer:
            for start in range(0, rows, AT_ONCE):
                numbers = np.arange(start, min(start + AT_ONCE, rows))
                digits = (numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8)
                buffers = [None, pa.py_buffer(offsets[: len(numbers) + 1]), pa.py_buffer(digits)]
                array = pa.BinaryArray.from_buffers(pa.binary(), len(numbers), buffers)
                writer.write_batch(pa.record_batch([array], schema=names_module._SCHEMA))

    return Names(mapped.written(write))


def synthetic_manifest(rows: int) -> DatasetManifest:
    digests, labels = mapped.zeros((rows, 32), np.uint8), mapped.zeros((rows,), np.int64)
    rng = np.random.default_rng(0)
    for start in range(0, rows, 1 << 20):
        part = slice(start, start + (1 << 20))
        digests[part] = np.frombuffer(rng.bytes(digests[part].size), np.uint8).reshape(-1, 32)
        labels[part] = rng.integers(0, 1000, len(labels[part]))
        mapped.release(digests, labels)
    return DatasetManifest("synthetic", synthetic_names(rows), digests, labels)


def manifest_job(rows: int) -> dict[str, Any]:
    steps = Steps()
    manifest = steps("make it (synthetic)", partial(synthetic_manifest, rows))
    if steps("search for equal names", partial(duplicate, manifest.ids)) is not None:
        raise RuntimeError("a name that is there once was found twice")
    file = steps("write items.arrow", manifest.to_arrow)
    places = np.append(np.random.default_rng(1).integers(0, rows, 1000), [0, rows - 1])
    kept = [(manifest.ids[place], manifest.sha256[place].tobytes(), int(manifest.labels[place])) for place in places]
    del manifest  # its files take as much disk as those of the one that is read
    again = steps("read items.arrow", partial(DatasetManifest.from_arrow, file))
    if kept != [(again.ids[place], again.sha256[place].tobytes(), int(again.labels[place])) for place in places]:
        raise RuntimeError("the manifest that was read is another one")
    root = steps("Merkle root", partial(getattr, again, "root"))
    return {"steps": steps.found, "items_arrow_MB": len(file) / 1e6, "root": root}


def plan_job(rows: int) -> dict[str, Any]:
    steps, found = Steps(), {}
    eligible = EligibleRows(rows, np.arange(7, rows, 1000))  # one in a thousand has no embedding
    for order in ("permutation", "window:65536"):

        def make(order: str = order) -> SelectionPlan:
            return SelectionPlan(
                eligible, batch_size=BATCH, epochs=EPOCHS, schedule=parse_schedule("cosine:0.2:0.8"), seed=0,
                order=parse_order(order), shard_rows=SHARD_ROWS,
            )  # fmt: skip

        plan = steps(f"plan, {order}", make)

        def epoch(plan: SelectionPlan = plan) -> tuple[int, int, int]:
            """Every batch of an epoch: rows, their sum, and the rows that stay."""
            count = total = kept = 0
            for seq in range(plan.batches_per_epoch, 2 * plan.batches_per_epoch):
                batch = plan.batch(seq)
                count, total, kept = count + len(batch.indices), total + int(batch.indices.sum()), kept + batch.keep
            return count, total, kept

        count, total, kept = steps(f"every batch of an epoch, {order}", epoch)
        expected = rows * (rows - 1) // 2 - int(eligible.left_out.sum())
        if (count, total, kept) != (len(eligible), expected, plan.kept_per_epoch[1]):
            raise RuntimeError(f"{order}: an epoch is not every row once")
        seconds = steps.found[f"every batch of an epoch, {order}"]["cpu_seconds"]
        found[order] = {"batches": plan.batches_per_epoch, "rows_per_cpu_second": round(count / max(seconds, 1e-9))}
    return {"steps": steps.found, "orders": found}


class MadeUp:
    """Objects of a store that are made up when they are asked for (:class:`gstds_cache.store.transport.Transport`).

    It knows of each shard one bit, so that what grows is the package's own.
    """

    exclusive = True

    def __init__(self, spec: CacheSpec) -> None:
        self.location, self._spec = Location.parse("s3://made/up"), spec
        self._committed = np.zeros(spec.shards, np.bool_)
        self._small: dict[str, bytes] = {}
        described = {"gstds": {"fingerprint": spec.fingerprint, "spec": spec.to_dict()}}
        labels = np.zeros(spec.items, np.int64)
        self._small |= {key: bytes(data) for key, data in layout.metadata_objects(spec, described, labels).items()} | {
            layout.ITEMS: b""
        }

    def _shard(self, key: str) -> int | None:
        parts = key.split("/")
        return (
            int(parts[2]) if key.startswith("embeddings/c/") else int(parts[1][:-5]) if parts[0] == "commits" else None
        )

    def exists(self, key: str) -> bool:
        shard = self._shard(key)
        return key in self._small if shard is None else bool(self._committed[shard])

    def get(self, key: str) -> bytes:
        if self._shard(key) is None and key not in self._small:
            raise FileNotFoundError(key)
        return self._small[key]

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def sha256(self, key: str) -> str:
        shard = self._shard(key)
        return f"{0 if shard is None else shard:064x}"

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self._shard(key) is None:
            self._small[key] = bytes(data)

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:  # noqa: ARG002
        shard = self._shard(key)
        assert shard is not None
        self._committed[shard] = True
        return True

    def delete(self, key: str) -> None:
        self._small.pop(key, None)

    def collect_temporaries(self) -> int:
        return 0

    def sizes(self, prefix: str = "") -> dict[str, int]:
        there = np.flatnonzero(self._committed).tolist()
        if prefix.startswith("commits"):
            return {self._spec.names.commit_key(shard): 600 for shard in there}
        return {layout.object_key(shard): 1 for shard in there}

    def lock(self) -> Any:
        return nullcontext()


def driver_job(units: int) -> dict[str, Any]:
    """What commits a store's shards and finishes it, as the process of a run does that embeds in this or in others."""
    spec = CacheSpec(items=units, items_root="0" * 64, encoder={"model": "made:up"}, dim=1, dtype="float16",
                     batch_size=1, shard_rows=1)  # fmt: skip
    metadata = StoreMetadata("s3://made/up", transport=MadeUp(spec))  # type: ignore[arg-type]  # no pieces, no lock
    steps = Steps()

    def commit() -> None:
        writer = StoreWriter(metadata)
        committed = writer.recover()
        for shard in [shard for shard in range(units) if shard not in committed]:
            digest = f"{shard:064x}"
            writer.commit_object(shard, b"1", digest, digest, read_back=False)

    steps("commit", commit)
    steps("finish", lambda: StoreWriter(metadata).finish())
    return {"steps": steps.found, "rise_bytes": round(1e6 * sum(s["anonymous_MB"] for s in steps.found.values()))}


def at_a_billion(found: dict[str, Any], per_unit: float) -> dict[str, Any]:
    """Counts, sizes and money of 10^9 rows of 1,280 float16 numbers, by the size of a shard."""
    last = found["manifest"][max(found["manifest"], key=int)]
    rows = max(map(int, found["manifest"]))
    scale, result = BILLION / rows, {}
    for megabytes in (4, 16, 64):
        shard_rows = megabytes * 10**6 // (DIM * ITEM_BYTES)
        shards = -(-BILLION // shard_rows)
        data = BILLION * DIM * ITEM_BYTES
        writes, reads = 2 * shards, 4 * shards  # object, record; HEAD, read back, and both once more at the end
        result[f"shards of {megabytes} MB"] = {
            "shard_rows": shard_rows,
            "objects": 2 * shards + 8,
            "commit_records_MB": shards * 600 / 1e6,
            "list_requests": -(-2 * shards // 1000),
            "driver_MB": shards * per_unit / 1e6,
            "store_TB": data / 1e12,
            "usd_to_write": round(writes * PRICES["put"] + reads * PRICES["get"], 2),
            "usd_to_read_an_epoch": round(shards * PRICES["get"] + 2 * shards / 1000 * PRICES["put"], 2),
            "usd_a_month": round(data / 1e9 * PRICES["gb_month"]),
        }
    return {
        "prices_usd": PRICES,
        "items_arrow_GB": last["items_arrow_MB"] * scale / 1e3,
        "cpu_minutes": {name: step["cpu_seconds"] * scale / 60 for name, step in last["steps"].items()},
        **result,
    }


JOBS = {"manifest": manifest_job, "plan": plan_job, "driver": driver_job}


def measure(job: str, size: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", job, "--rows", str(size)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(f"{job} of {size} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def slopes(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for (few, a), (many, b) in pairwise(found.items()):
        yield f"{few} to {many}", round((b["rise_bytes"] - a["rise_bytes"]) / (int(many) - int(few)))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    made.add_argument("--units", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    made.add_argument("--child", choices=JOBS)
    arguments = made.parse_args()
    if arguments.child:
        print(json.dumps(JOBS[arguments.child](arguments.rows[0])))
        return
    if arguments.smoke:
        arguments.rows, arguments.units = [70_000], [100, 1000]
    found: dict[str, Any] = {
        job: {str(rows): measure(job, rows) for rows in arguments.rows} for job in JOBS if job != "driver"
    }
    found["driver"] = {str(units): measure("driver", units) for units in arguments.units}
    per_unit = dict(slopes(found["driver"]))
    found["driver_bytes_per_unit"] = per_unit
    report("plan-size", {**found, "at_a_billion": at_a_billion(found, list(per_unit.values())[-1])}, arguments)


if __name__ == "__main__":
    main()
