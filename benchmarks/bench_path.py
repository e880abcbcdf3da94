"""The whole path of a batch on a GPU, from rows on the device to records in a file: samples per second, and shares.

    python benchmarks/bench_path.py [--rows ROWS.npy] [--count 1280000] [--batch-size 512] [--seconds 100]

A store of COUNT rows is made from ROWS, float16 [N, D], each repeated with noise, so that batches are those of a large
data set. The rule is the default one, drawing by a difficulty that is given for every row. Beside the GPU the same
batches are selected by all CPU cores, for as long as time allows. With --smoke a CPU runs the kernels, compiled by g++.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import made_up
from harness import parser, report, spread, write

from gstds_cache.config import SelectConfig
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.graph.cuda import products
from gstds_cache.runtime.threads import cores
from gstds_cache.selection import device_path
from gstds_cache.selection.device_rows import upload
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import open_writer
from gstds_cache.stream.writer import write_file

SHARD = 16_384
DIM = 1280  # of the rows that are expected
NOISE = 0.3  # of the rows' own spread
CLASSES = 1000


def write_store(path: Path, base: np.ndarray, count: int, device: torch.device) -> None:
    """``count`` rows made from ``base``, float16, with labels."""
    dim = base.shape[1]
    labels = np.arange(count) * 7919 % CLASSES
    manifest = DatasetManifest("benchmark", tuple(map(str, range(count))), np.zeros((count, 32), np.uint8), labels)
    spec = CacheSpec(
        items=count, items_root=manifest.root, encoder={}, dim=dim, dtype="float16", batch_size=1, shard_rows=SHARD
    )
    there = torch.from_numpy(base).to(device)
    scale = NOISE * there.float().std()
    generator = torch.Generator(device).manual_seed(0)
    with open_writer(path, spec, labels=labels, items=manifest.to_arrow(), attributes={}) as writer:
        for shard, first in enumerate(range(0, count, SHARD)):
            which = torch.arange(first, min(first + SHARD, count), device=device) % len(there)
            noise = torch.randn(len(which), dim, generator=generator, device=device)
            writer.commit(shard, (there[which].float() + scale * noise).half().cpu().numpy())
        writer.finish()


@contextlib.contextmanager
def device_of(smoke: bool) -> Iterator[torch.device]:
    """The GPU; in a smoke run the CPU, on which the kernels are emulated as in the tests."""
    if not smoke:
        yield torch.device("cuda", torch.cuda.current_device())
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
    from emulated import H100_SHARED_MEMORY, WHY_NOT, EmulatedKernels

    from gstds_cache.cuda import build, launch
    from gstds_cache.spectral import fiedler

    if WHY_NOT:
        raise SystemExit(f"--smoke emulates the kernels: {WHY_NOT}")
    with tempfile.TemporaryDirectory() as folder:
        build.kernel = EmulatedKernels(build.place_of_cubins().path or Path(folder))
        build.why_not = lambda device: ""  # noqa: ARG005
        launch.shared_memory_limit = lambda device: H100_SHARED_MEMORY  # noqa: ARG005
        fiedler.why_not_solved = lambda *_: "left to the CPU"  # emulated kernels run in one thread at a time
        yield torch.device("cpu")


def timed(selector: BatchSelector, batches: int, file: Path | None = None) -> dict[str, float]:
    """Seconds of some batches from the first, by the clock and of this thread's own work."""
    begun, own = time.perf_counter(), time.thread_time()
    running = selector.run() if file is None else write_file(selector, file)
    with contextlib.closing(running):
        done = sum(1 for _ in itertools.islice(running, batches))
        if batches >= selector.plan.total_batches:
            for _ in running:  # the end of a file is part of writing it
                raise AssertionError("more batches than there are")
    return {"batches": done, "seconds": time.perf_counter() - begun, "own_seconds": time.thread_time() - own}


def microseconds(trials: list[dict[str, float]], size: int) -> dict[str, Any]:
    """What trials took per batch, and millions of samples per second."""
    each = [1e6 * trial["seconds"] / trial["batches"] for trial in trials]
    return {
        "us_per_batch": spread(each),
        "host_us_per_batch": spread([1e6 * trial["own_seconds"] / trial["batches"] for trial in trials]),
        "million_samples_per_second": spread([size / us for us in each]),
        "seconds": [trial["seconds"] for trial in trials],
    }


def shares(store: EmbeddingStore, config: SelectConfig, device: torch.device, batches: int) -> dict[str, float]:
    """Microseconds a batch of each part, one stack at a time so that none runs beside another."""
    before, device_path.IN_FLIGHT = device_path.IN_FLIGHT, 1
    try:
        selector = BatchSelector(store, config)
        timed(selector, 1)  # rows are uploaded, kernels loaded
        selector.counts.seconds = dict.fromkeys(selector.counts.seconds, 0.0)
        done = timed(selector, batches)["batches"]
        found = {name: 1e6 * spent / done for name, spent in selector.counts.seconds.items() if spent}
    finally:
        device_path.IN_FLIGHT = before
    if device.type == "cuda":
        # The products are a part of "graph": alone, on as many graphs.
        stack = selector.plan.stack(0, min(batches, 256))
        rows, _ = selector.device_run.rows.of(stack.indices, upload(stack.indices.astype(np.int32), device))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        products(rows)
        marks[0].record()
        products(rows)
        marks[1].record()
        marks[1].synchronize()
        found["product"] = 1e3 * marks[0].elapsed_time(marks[1]) / len(stack)
        found["graph"] -= found["product"]
    return found


def several_epochs(
    store: EmbeddingStore, config: SelectConfig, selector: BatchSelector, trials: int, size: int
) -> dict[str, Any]:
    """Four epochs in one run, each with batches of its own, in stacks of several sizes.

    An epoch of 1.28 million rows is a few stacks: before the first one the device has nothing to do, and behind the
    last one only the host has.
    """
    found, usual = {}, device_path.GRAPHS_A_PROCESSOR
    try:
        for graphs in (usual, usual / 2, usual / 4):
            device_path.GRAPHS_A_PROCESSOR = graphs
            other = BatchSelector(store, replace(config, epochs=4, batch_assignments=0))
            other.device_run.__dict__["rows"] = selector.device_run.rows
            timed(other, 1)
            name = "path, four epochs" + (f", {graphs:g} graphs a processor in a stack" if graphs != usual else "")
            found[name] = microseconds([timed(other, other.plan.total_batches) for _ in range(trials)], size)
    finally:
        device_path.GRAPHS_A_PROCESSOR = usual
    return found


def keep(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what has been measured so far: what is killed, or fails, later has shown that much."""
    if arguments.out is not None:
        write(arguments.out, json.dumps(result, indent=1))


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Everything, most important first; what there is no time for is left out."""
    begun = time.perf_counter()

    def left() -> float:
        return arguments.seconds - (time.perf_counter() - begun)

    base = made_up(1, 600)[0].astype(np.float16) if arguments.rows is None else np.load(arguments.rows)
    size, trials, cuda = arguments.batch_size, arguments.trials, device.type == "cuda"
    write_store(folder / "rows.store", base, arguments.count, device)
    np.save(folder / "scores.npy", np.random.default_rng(0).random(arguments.count) ** 4)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "emulated",
        "rows": arguments.count,
        "dim": int(base.shape[1]),
        "batch_size": size,
        "seconds_to_write_the_store": time.perf_counter() - begun,
    }
    store = EmbeddingStore(folder / "rows.store", access="device")
    config = SelectConfig(
        batch_size=size,
        epochs=1,
        device=str(device),
        guidance=f"file:{folder / 'scores.npy'}",
        threads=0,
        knn_backend="auto" if cuda else "cuda",
    )
    opening = time.perf_counter()
    selector = BatchSelector(store, config)
    assert selector.device_run.has_rule, selector.device_run.why_not
    timed(selector, 1)
    result["seconds_to_the_first_batch"] = time.perf_counter() - opening
    epoch = selector.plan.total_batches
    result["path"] = {
        "rows": selector.device_run.rows_reason,
        "batches": epoch,
        **microseconds([timed(selector, epoch) for _ in range(trials)], size),
    }
    keep(result, arguments)
    failed = sum(selector.counts.status[name] for name in ("max_iterations", "dense_fallback"))
    result["share_solved_again_on_the_cpu"] = failed / max(selector.counts.batches, 1)
    result |= several_epochs(store, config, selector, trials, size)
    keep(result, arguments)
    file = folder / "selection.arrow"
    written = []
    for _ in range(trials):
        file.unlink(missing_ok=True)
        written.append(timed(selector, epoch, file))
    result["path_to_a_file"] = microseconds(written, size)
    keep(result, arguments)
    result["shares_us_per_batch"] = shares(store, config, device, epoch)
    for name, changes in {"one vector": {"rule": "coverage"}, "normalized": {"laplacian": "normalized"}}.items():
        if left() > arguments.seconds * 0.4:
            other = BatchSelector(
                store, replace(config, **({"guidance": "none"} if "rule" in changes else {}), **changes)
            )
            other.device_run.__dict__["rows"] = selector.device_run.rows
            timed(other, 1)
            result[f"path, {name}"] = microseconds([timed(other, epoch) for _ in range(2)], size)
    if left() > arguments.seconds * 0.25:
        copied = EmbeddingStore(folder / "rows.store", access="memory", memory_budget=1 << 40)
        other = BatchSelector(copied, config)
        timed(other, 1)
        result["path, rows copied stack by stack"] = microseconds([timed(other, min(epoch, 1024))], size)
    keep(result, arguments)
    with contextlib.closing(selector.run()) as running:
        ours = list(itertools.islice(running, 64))
    result["beside_the_cpu"] = beside_the_cpu(store, config, ours, cuda, left)
    return result


def beside_the_cpu(
    store: EmbeddingStore, config: SelectConfig, ours: list[Any], cuda: bool, left: Any
) -> dict[str, Any]:
    """The same first batches by all CPU cores."""
    if not cuda:
        return {"left out": "the kernels are emulated"}
    opened = EmbeddingStore(store.location, access="memory", memory_budget=1 << 40)
    selector = BatchSelector(opened, replace(config, device="cpu", knn_backend="auto"))
    theirs = list(itertools.islice(selector.run(), len(ours)))
    done = timed(selector, int(max(64, min(2048, left() * cores() * 500))))
    return {
        "cores": cores(),
        "us_per_batch": 1e6 * done["seconds"] / done["batches"],
        "same_rows": float(np.mean([np.isin(a.kept, b.kept).mean() for a, b in zip(ours, theirs, strict=True)])),
        "same_status": float(np.mean([a.status == b.status for a, b in zip(ours, theirs, strict=True)])),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=Path, help="float16 [N, D] as numpy.save writes them [default: made-up clusters]")
    made.add_argument("--count", type=int, default=1_280_000, help="rows of the store")
    made.add_argument("--batch-size", type=int, default=512)
    made.add_argument("--seconds", type=float, default=100, help="after which nothing more is begun")
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.count, arguments.batch_size, arguments.trials = None, 700, 64, 1
    shared = Path("/dev/shm")  # flushing gigabytes to a disk is no part of what is measured
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 3 * arguments.count * 2 * DIM
    with device_of(arguments.smoke) as device, tempfile.TemporaryDirectory(dir=shared if roomy else None) as folder:
        report("path", measure(arguments, device, Path(folder)), arguments)


if __name__ == "__main__":
    main()
