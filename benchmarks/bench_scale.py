"""A cluster of two one-core workers beside this process's own workers, Ray Data and a plain pool; kills; selection.

    python benchmarks/bench_scale.py [FOLDER] [--images 4000]

- Embedding: images/s under way, on ours with Ray, ours in one process (``workers=2``), Ray Data's ``map_batches`` with
  two actors (files read, decoded and embedded in batches, rows written as Parquet), and a pool of two processes that
  write a file for each partition, as clip-retrieval does. Under way: of ours from when two shards are committed, of the
  others from when both processes have done a batch. Start-up apart.
- What a kill costs: one worker is killed half-way; images put through the model again.
- Selection: batches/s of one node, and of two.

All use the same model, batch size and images; FOLDER holds them (PNG or JPEG), else they are made. The cluster is on
loopback.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import parser, report
from PIL import Image

import gstds_cache
from gstds_cache.data.decode import decode_image, to_rgb
from gstds_cache.embedding.decoding import decode_by, decoding_of
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.store.reader import EmbeddingStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
from ray_cluster import LoopbackCluster
from vector_store import vector_store

MODEL = "timm:tf_efficientnet_lite0?size=64"
BATCH = 16


def make_pictures(folder: Path, count: int) -> Path:
    """PNGs of 128 x 128."""
    (folder / "a").mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(small).resize((128, 128)).save(folder / "a" / f"{number:06d}.png")
    return folder


class Embedder:
    """What one process of a rival does with a batch of files: decode as the model wants, one forward pass, rows.

    ``log`` gets a line for each image that went through the model.
    """

    def __init__(self, log: str) -> None:
        torch.set_num_threads(1)
        self.log = log
        self.encoder = open_encoder(MODEL)
        decode_by(self.encoder, "pillow", torch.device("cpu"))
        self.pid = os.getpid()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = np.stack([self.pixels(data) for data in batch["bytes"]])
        count = len(pixels)
        padded = torch.from_numpy(np.concatenate([pixels, np.zeros((BATCH - count, *pixels.shape[1:]), np.uint8)]))
        rows = self.encoder.queue(padded)[:count].numpy().astype(np.float16)
        with open(self.log, "a") as file:  # noqa: PTH123
            file.write("".join(f"{self.pid} {time.time()} {path}\n" for path in batch["path"]))
        return {"path": batch["path"], "rows": rows}

    def pixels(self, data: bytes) -> np.ndarray:
        """[3, H, W] of a file's bytes, as the model looks at it."""
        way = self.encoder.spec.preprocessing
        return np.asarray(way.pixels(to_rgb(decode_image(data, decoding_of(way)))))


class Kill(threading.Thread):
    """Kills one process of those in a log, once it has so many lines."""

    def __init__(self, log: Path, lines: int) -> None:
        super().__init__(daemon=True)
        self.log, self.lines, self.killed = log, lines, 0

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.02)
            done = self.log.read_text().splitlines() if self.log.exists() else []
            if len(done) >= self.lines:
                self.killed = int(done[-1].split()[0])
                os.kill(self.killed, signal.SIGKILL)


def rate_of(log: Path) -> tuple[float, int]:
    """Images/s from when every process had done a batch, and images put through the model."""
    lines = [line.split() for line in log.read_text().splitlines()]
    first = {}
    for pid, at, _ in lines:
        first.setdefault(pid, float(at))
    begun, ended = max(first.values()), max(float(at) for _, at, _ in lines)
    after = sum(float(at) > begun for _, at, _ in lines)
    return after / max(ended - begun, 1e-9), len(lines)


def rate_of_commits(where: Path, shard_rows: int, images: int) -> float:
    """Images/s from when two shards were committed, by the times of the commit records.

    Not by reported progress: a task of Ray's reports several shards at once, and the first report would be late.
    """
    times = np.sort([path.stat().st_mtime for path in (where / "commits").iterdir()])
    return float((images - 2 * shard_rows) / max(times[-1] - times[1], 1e-9))


def ours(folder: Path, where: Path, **options: Any) -> dict[str, Any]:
    """Embed with this package: images/s under way, start-up, and what was done twice."""
    seen: list[tuple[float, int]] = []
    begun = time.time()

    def progress(phase: str, done: int, _total: int, _shares: Any) -> None:
        if phase == "embed":
            seen.append((time.time(), done))

    told: list[str] = []
    store = gstds_cache.embed(
        f"folder:{folder}", where, model=MODEL, batch_size=BATCH, device="cpu", progress=progress,
        notify=told.append, **options,
    )  # fmt: skip
    assert store.report is not None
    return {
        "images_per_second": round(rate_of_commits(where, options["shard_rows"], store.spec.items), 1),
        "startup_seconds": round(seen[0][0] - begun, 1),
        "total_seconds": round(time.time() - begun, 1),
        "embedded": store.report.embedded,
        "told": [line for line in told if line.startswith("ray")],
    }


def ray_data(files: list[str], out: Path, log: Path) -> dict[str, Any]:
    """Ray Data: files in, batches through two actors, rows out as Parquet."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    begun = time.time()
    # Reading and writing ask for a twentieth of a core: for a whole one, Ray's default, they would wait for the two
    # actors, and these for what is read, for ever.
    data = ray.data.read_binary_files(
        files, include_paths=True, override_num_blocks=max(2, len(files) // 128), num_cpus=0.05
    )
    data = data.map_batches(
        Embedder,
        fn_constructor_kwargs={"log": str(log)},
        batch_size=BATCH,
        num_cpus=0.9,
        compute=ray.data.ActorPoolStrategy(size=2),
        max_restarts=3,
        max_task_retries=3,
    )
    data.write_parquet(str(out), ray_remote_args={"num_cpus": 0.05})
    rate, through = rate_of(log)
    return {"images_per_second": round(rate, 1), "total_seconds": round(time.time() - begun, 1), "embedded": through}


def partition(files: list[str], out: str, log: str) -> None:
    """One process of the plain pool: rows of its files, written when all of them are there."""
    embed, rows = Embedder(log), []
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        batch = {"bytes": np.array([Path(path).read_bytes() for path in part], object), "path": np.array(part)}
        rows.append(embed(batch)["rows"])
    np.save(out, np.concatenate(rows))


def plain_pool(files: list[str], out: Path, log: Path, parts: int = 4) -> dict[str, Any]:
    """Two processes, a partition each at a time; a partition whose process was killed is begun anew."""
    begun, context = time.time(), multiprocessing.get_context("spawn")
    out.mkdir()
    todo = [(files[part::parts], str(out / f"{part}.npy"), str(log)) for part in range(parts)]
    running: list[Any] = []
    while todo or running:
        while todo and len(running) < 2:
            work = todo.pop(0)
            process = context.Process(target=partition, args=work)
            process.start()
            running.append((process, work))
        time.sleep(0.05)
        for process, work in list(running):
            if process.exitcode is not None:
                running.remove((process, work))
                if process.exitcode:
                    todo.append(work)
    rate, through = rate_of(log)
    return {"images_per_second": round(rate, 1), "total_seconds": round(time.time() - begun, 1), "embedded": through}


def selection(store: Path, epochs: int, engine: str) -> float:
    """Batches/s, under way."""
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        gstds_cache.select(
            store, out=Path(folder, "selection.arrow"), device="cpu", batch_assignments=0, epochs=epochs, engine=engine,
            threads=1, access="memory", progress=lambda *_: seen.append(time.time()), seed=time.time_ns() % 10**9,
        )  # fmt: skip
    skip = len(seen) // 4
    return (len(seen) - 1 - skip) / max(seen[-1] - seen[skip], 1e-9)


def made_up_store(where: Path, rows: int) -> Path:
    """A store of vectors in 20 clusters."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, rows)
    vectors = rng.normal(size=(20, 256))[labels] + rng.normal(size=(rows, 256))
    return vector_store(where, vectors, labels, classes=[str(label) for label in range(20)], shard_rows=2048) and where


class KillWorker(threading.Thread):
    """Kills the Ray worker that committed a shard last, once so many are committed."""

    def __init__(self, commits: Path, shards: int) -> None:
        super().__init__(daemon=True)
        self.commits, self.shards, self.killed = commits, shards, 0
        self.finished: dict[Path, int] = {}

    def made_again(self) -> int:
        """Shards that were finished when the worker was killed and were written again after that."""
        return sum(path.stat().st_mtime_ns != at for path, at in self.finished.items())

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.02)
            if self.commits.is_dir() and len(list(self.commits.iterdir())) >= self.shards:
                for entry in Path("/proc").glob("[0-9]*/cmdline"):
                    with suppress(OSError):
                        if entry.read_bytes().startswith(b"ray::gstds-cache"):
                            self.killed = int(entry.parent.name)
                            objects = (self.commits.parent / "embeddings" / "c").rglob("*")
                            self.finished = {path: path.stat().st_mtime_ns for path in objects if path.is_file()}
                            os.kill(self.killed, signal.SIGKILL)
                            return


def embedding(files: Path, folder: Path, rows: int, trials: int) -> dict[str, Any]:
    """All ways of embedding in turn, ``trials`` times, then all but the first with a kill; shards of ``rows`` rows."""
    names = sorted(map(str, files.rglob("*.*")))
    half = len(names) // 2
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ours, in one process": lambda where: ours(files, where, shard_rows=rows, workers=2),
        "ours, Ray": lambda where: ours(files, where, shard_rows=rows, engine="ray"),
        "Ray Data": lambda where: ray_data(names, where, where.with_suffix(".log")),
        "plain pool": lambda where: plain_pool(names, where, where.with_suffix(".log")),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for trial in range(trials):
        for number, (name, way) in enumerate(ways.items()):
            found[name].append(way(folder / f"{trial}-{number}"))
            print(trial, name, found[name][-1], file=sys.stderr, flush=True)
    same = np.array_equal(
        EmbeddingStore(folder / "0-0").gather(np.arange(len(names))),
        EmbeddingStore(folder / "0-1").gather(np.arange(len(names))),
    )
    where = folder / "ray-killed"
    kill = KillWorker(where / "commits", half // rows)
    kill.start()
    killed = {"ours, Ray": ways["ours, Ray"](where)}
    killed["ours, Ray"] |= {
        "finished_shards_at_the_kill": len(kill.finished), "finished_shards_made_again": kill.made_again()
    }  # fmt: skip
    for name in ("Ray Data", "plain pool"):
        where = folder / f"{name.replace(' ', '-')}-killed"
        killer = Kill(where.with_suffix(".log"), half)
        killer.start()
        one = killed[name] = ways[name](where)
        one["embedded_again"] = one["embedded"] - len(names)  # ours counts an image once, when its shard is committed
        killer.killed = killer.killed or -1
    for name, one in killed.items():
        print(name, "killed", one, file=sys.stderr, flush=True)
    rates = {name: np.array([one["images_per_second"] for one in runs]) for name, runs in found.items()}
    ratios = {name: rates["ours, Ray"] / rate for name, rate in rates.items() if name != "ours, Ray"}
    return {
        "embedding": found,
        "a worker killed": killed,
        "ours with Ray over": {
            name: {"median": round(float(np.median(ratio)), 3), "trials": [round(float(one), 3) for one in ratio]}
            for name, ratio in ratios.items()
        },
        "same rows from both engines": bool(same),
    }


def main() -> None:
    """Run all parts and write the result."""
    options = parser(__doc__)
    options.add_argument("folder", nargs="?", type=Path)
    options.add_argument("--images", type=int, default=4000)
    options.add_argument("--rows", type=int, default=200_000)
    arguments = options.parse_args()
    images, rows = (96, 4096) if arguments.smoke else (arguments.images, arguments.rows)
    shard, trials = (32, 1) if arguments.smoke else (128, arguments.trials)
    from gstds_cache.cluster.session import connected

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = folder / "pictures"
        if arguments.folder is None or arguments.smoke:
            make_pictures(files, images)
        else:
            files.mkdir()
            found = sorted(path for path in arguments.folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))
            for number, path in enumerate(found[:images]):
                (files / f"{number:06d}{path.suffix}").symlink_to(path)
        store = made_up_store(folder / "vectors.store", rows)
        load = os.getloadavg()[0]
        begun = time.time()
        cluster = LoopbackCluster(1)
        with connected(cluster.address):
            selected = {"1 worker": selection(store, 2, "ray")}
            node = cluster.add()
            started = time.time() - begun
            selected["2 workers"] = selection(store, 2, "ray")
            selected["1 worker again"] = 0.0
            result: dict[str, Any] = {"cluster_seconds": round(started, 1), **embedding(files, folder, shard, trials)}
            cluster.nodes.append(node)
            cluster.remove(node)
            selected["1 worker again"] = selection(store, 2, "ray")
        selected["local, 1 thread"] = selection(store, 2, "local")
        cluster.stop()
        one = (selected["1 worker"] + selected["1 worker again"]) / 2
        result["selection"] = {name: round(value, 1) for name, value in selected.items()}
        result["selection_scaling"] = round(selected["2 workers"] / one, 2)
        result |= {
            "images": images,
            "shard_rows": shard,
            "rows": rows,
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
        }
        report("scale", result, arguments)


if __name__ == "__main__":
    main()
