"""What a GPU does: embedding, graphs, Fiedler vectors and the path of a batch, beside their limits and all CPU cores.

    python benchmarks/bench_gpu.py DATASET [--images 3000] [--batch-sizes 256 512 1024 2048]

Everything is measured on the device and, interleaved with it, on the same machine's CPU with all its cores. Nearest
neighbours by backend are in ``bench_knn.py``, which measures on CUDA where there is CUDA.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from the next in turn

import numpy as np
import torch
from batches import batches_of
from bench_embed import at_own_size, decode_rate, some_of
from harness import interleaved, limit_threads, parser, report, spread

from gstds_cache.config import DEFAULT_MODEL, DEFAULT_RULE, EmbedConfig, SelectConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.job import BATCH_SIZE
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import symmetrise
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.threads import cores
from gstds_cache.selection import run as selection_run
from gstds_cache.selection.run import BatchSelector
from gstds_cache.spectral.fiedler import fiedler_of_graph
from gstds_cache.store.reader import EmbeddingStore


def say(part: str, result: dict[str, object]) -> None:
    """Show what was measured: time on such a machine is short, and what is shown is not lost."""
    print(time.strftime("%H:%M:%S"), part, json.dumps(result[part]), file=sys.stderr, flush=True)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_forward(model: str, device: torch.device, batches: int) -> float:
    """Images per second of the bare forward pass, pixels and features staying on the device."""
    encoder = open_encoder(model, allow_untrained=True).to(device)
    size = BATCH_SIZE[device.type]
    pixels = torch.randint(0, 256, (size, *encoder.input_shape), dtype=torch.uint8, device=device)
    encoder.embed(pixels)
    wait(device)
    begun = time.perf_counter()
    for _ in range(batches):
        encoder.embed(pixels)
    wait(device)
    return batches * size / (time.perf_counter() - begun)


def embedding(source: ImageSource, model: str, device: torch.device, store: Path, trials: int) -> dict[str, object]:
    """Images per second of whole runs into new stores; the last one stays at ``store``."""
    rates: dict[str, list[float]] = {"embed": [], "forward": [], "decode_one_core": []}
    shares: list[dict[str, float]] = []
    workers = 0
    for trial in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            where = store if trial == trials - 1 else Path(folder) / "store"
            config = EmbedConfig(model=at_own_size(model), device=str(device), allow_untrained=True, decode="exact")
            done = embed_dataset(source, config, where=where).report
        rates["embed"].append(done.images_per_second)
        rates["forward"].append(bare_forward(model, device, 4))
        rates["decode_one_core"].append(decode_rate(source, open_encoder(model, allow_untrained=True), 256))
        shares.append(done.shares)
        workers = done.workers
    limits = [
        min(forward, decode * cores())
        for forward, decode in zip(rates["forward"], rates["decode_one_core"], strict=True)
    ]
    return {
        "model": model,
        "images": len(source),
        "workers": workers,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "limit": "the lesser of the bare forward pass and of decoding on all cores",
        "embed_over_limit": spread([a / b for a, b in zip(rates["embed"], limits, strict=True)]),
        "shares": shares[-1],
    }


def solver(store: Path, device: torch.device, size: int, graphs: int, knn: int, trials: int) -> dict[str, object]:
    """Milliseconds per graph of the solver on the device and on the CPU, for 1 and 8 vectors."""
    rows = normalized_rows(torch.from_numpy(batches_of([store], graphs, size)))
    on_cpu = bridge_components(symmetrise(nearest(rows, knn)), rows)[0]
    there = rows.to(device)
    on_device = bridge_components(symmetrise(nearest(there, knn)), there)[0]
    found: dict[str, object] = {"graphs": graphs}
    for q in (1, 8):

        def solve(graph: object, threads: int, q: int = q) -> None:
            fiedler_of_graph(graph, q=q, threads=threads)
            wait(device)

        timed = interleaved(
            trials,
            device=lambda: solve(on_device, 1),
            cpu=lambda: solve(on_cpu, cores()),
            cpu_1_thread=lambda: solve(on_cpu, 1),
        )
        ours, theirs = fiedler_of_graph(on_device, q=q), fiedler_of_graph(on_cpu, q=q)
        cosine = (ours.vector.cpu() * theirs.vector).sum(dim=1).abs()
        found[f"q={q}"] = {
            "ms_per_graph": {name: 1e3 * spent["median"] / graphs for name, spent in timed.items()},
            "seconds": timed,
            "cpu_over_device": spread(
                [a / b for a, b in zip(timed["cpu"]["trials"], timed["device"]["trials"], strict=True)]
            ),
            "iterations": {"device": ours.iterations.tolist()[:8], "cpu": theirs.iterations.tolist()[:8]},
            "cosine_of_vectors": {"median": float(cosine.median()), "min": float(cosine.min())},
        }
    return found


def path(store: EmbeddingStore, device: torch.device, size: int, batches: int, trials: int) -> dict[str, object]:
    """The whole path of a batch, by stack size on the device, beside the CPU; and whether both keep the same rows."""
    epochs = 1 + batches * size // (len(store) // 2)

    def config(where: str, rule: str = "coverage", **others: str) -> SelectConfig:
        return SelectConfig(
            batch_size=size,
            epochs=epochs,
            batch_assignments=0,
            device=where,
            rule=rule,
            threads=0,
            guidance="auto" if rule == DEFAULT_RULE else "none",
            **others,
        )

    work: dict[str, dict[str, float]] = {}

    def select(name: str, made: SelectConfig, stack: int | None = None) -> list[np.ndarray]:
        kept = []
        before = dict(selection_run.STACK)
        if stack is not None:
            selection_run.STACK[device.type if made.solver == "cuda" else "cpu"] = stack
        try:
            selector = BatchSelector(store, made)
            with contextlib.closing(selector.run()) as running:
                for selection in running:
                    kept.append(selection.kept)
                    if len(kept) == batches:
                        break
        finally:
            selection_run.STACK.update(before)
        spent = {phase: seconds for phase, seconds in selector.counts.seconds.items() if seconds}
        work[name] = {phase: seconds / sum(spent.values()) for phase, seconds in spent.items()}
        return kept

    ways = {f"device, stacks of {n}": (config(str(device)), n) for n in (4, 16)}
    if device.type == "cuda":
        ways["device, torch"] = (config(str(device), knn_backend="torch"), None)
        ways["device, solved there"] = (config(str(device), solver="cuda"), None)
    ways |= {
        "cpu": (config("cpu"), None),
        f"device, {DEFAULT_RULE}": (config(str(device), DEFAULT_RULE), None),
        f"cpu, {DEFAULT_RULE}": (config("cpu", DEFAULT_RULE), None),
    }
    timed = interleaved(trials, **{name: lambda name=name, way=way: select(name, *way) for name, way in ways.items()})
    same = {}
    for rule in ("coverage", DEFAULT_RULE):
        pairs = zip(select("", config(str(device), rule)), select("", config("cpu", rule)), strict=True)
        same[rule] = float(np.mean([np.isin(ours, theirs).mean() for ours, theirs in pairs]))
    work.pop("", None)
    return {
        "batches": batches,
        "ms_per_batch": {name: 1e3 * spent["median"] / batches for name, spent in timed.items()},
        "seconds": timed,
        "work": work,
        "same_rows_kept_as_on_the_cpu": same,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("dataset", nargs="?", default="digits")
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--images", type=int, default=3000)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    made.add_argument("--knn", type=int, default=10)
    made.add_argument("--device", default="auto")
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.model, arguments.trials, arguments.batch_sizes = 96, "timm:test_resnet", 1, [32]
    device = resolve_device(arguments.device)
    keep_freed_memory()  # as our commands do; it holds for everyone in this process
    source = some_of(arguments.dataset, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "embedded.store"
        result: dict[str, object] = {
            "device": str(device),
            "embedding": embedding(source, arguments.model, device, where, arguments.trials),
        }
        say("embedding", result)
        limit_threads(cores())
        store = EmbeddingStore(where, access="memory")
        for size in arguments.batch_sizes:
            graphs = 2 if arguments.smoke else max(4, min(64, 65536 // size))
            result[f"solver, B={size}"] = solver(where, device, size, graphs, arguments.knn, arguments.trials)
            say(f"solver, B={size}", result)
            batches = 3 if arguments.smoke else max(8, min(256, 131072 // size))
            result[f"path, B={size}"] = path(store, device, size, batches, arguments.trials)
            say(f"path, B={size}", result)
    report("gpu", result, arguments)


if __name__ == "__main__":
    main()
