"""The store's readers and checks against plain files, and beside other formats: speed, and what each does with damage.

    python benchmarks/bench_store.py [--rows 200000] [--dim 512] [--trials 5]

Everything is read from a warm page cache: what is compared is the work above the disk. Peers: a NumPy memmap, Parquet
(pyarrow), Lance where it is installed, and Zarr with its library's defaults.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from harness import interleaved, parser, report

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import GstdsError
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.verify import verify
from gstds_cache.store.writer import open_writer

BATCH = 512
BLOCK = 4096
WINDOW_SHARDS = 8


def make_rows(count: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def blocks(rows: np.ndarray, stop: int | None) -> Iterator[np.ndarray]:
    """Rows in blocks; the process kills itself when ``stop`` of them were handed out and written."""
    for number, start in enumerate(range(0, len(rows), BLOCK)):
        if number == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        yield rows[start : start + BLOCK]


class Ours:
    name = "gstds-cache"

    def write(self, path: Path, rows: np.ndarray, stop: int | None = None, labels: np.ndarray | None = None) -> None:
        count, dim = rows.shape
        labels = np.zeros(count, np.int64) if labels is None else labels
        manifest = DatasetManifest("benchmark", tuple(map(str, range(count))), np.zeros((count, 32), np.uint8), labels)
        spec = CacheSpec(
            items=count, items_root=manifest.root, encoder={}, dim=dim, dtype="float16", batch_size=1, shard_rows=BLOCK
        )
        with open_writer(path, spec, labels=manifest.labels, items=manifest.to_arrow(), attributes={}) as writer:
            for shard, block in enumerate(blocks(rows, stop)):
                writer.commit(shard, block)
            writer.finish()

    def read(self, path: Path) -> Iterator[np.ndarray]:
        store = EmbeddingStore(path, access="window", memory_budget=0)
        for shard in range(store.spec.shards):
            yield store.shard(shard)

    def gather(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        return EmbeddingStore(path, access="mirror").gather

    def largest(self, path: Path) -> Path:
        return path / layout.object_key(1)


class Memmap:
    name = "npy memmap"

    def write(self, path: Path, rows: np.ndarray, stop: int | None = None) -> None:
        file = np.lib.format.open_memmap(path, "w+", rows.dtype, rows.shape)
        for number, block in enumerate(blocks(rows, stop)):
            file[number * BLOCK : number * BLOCK + len(block)] = block
        file.flush()

    def read(self, path: Path) -> Iterator[np.ndarray]:
        file = np.load(path, mmap_mode="r")
        for start in range(0, len(file), BLOCK):
            yield np.array(file[start : start + BLOCK])

    def gather(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        file = np.load(path, mmap_mode="r")
        return lambda rows: file[rows]

    def largest(self, path: Path) -> Path:
        return path


class Parquet:
    name = "Parquet"

    def write(self, path: Path, rows: np.ndarray, stop: int | None = None) -> None:
        kind = pa.list_(pa.float16(), rows.shape[1])
        with pq.ParquetWriter(path, pa.schema([("x", kind)])) as writer:
            for block in blocks(rows, stop):
                writer.write_batch(_batch(block))

    def read(self, path: Path) -> Iterator[np.ndarray]:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BLOCK):
            yield _rows(batch.column(0))

    def gather(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        file = pq.ParquetFile(path)

        def pick(rows: np.ndarray) -> np.ndarray:
            groups = rows // BLOCK
            out = np.empty((len(rows), _rows(file.read_row_group(0)["x"].chunk(0)).shape[1]), np.float16)
            for group in np.unique(groups):
                here = groups == group
                out[here] = _rows(file.read_row_group(int(group))["x"].combine_chunks())[rows[here] % BLOCK]
            return out

        return pick

    def largest(self, path: Path) -> Path:
        return path


class Lance:
    name = "Lance"

    def write(self, path: Path, rows: np.ndarray, stop: int | None = None) -> None:
        import lance

        schema = pa.schema([("x", pa.list_(pa.float16(), rows.shape[1]))])
        reader = pa.RecordBatchReader.from_batches(schema, map(_batch, blocks(rows, stop)))
        lance.write_dataset(reader, str(path), max_rows_per_file=BLOCK * 8)

    def read(self, path: Path) -> Iterator[np.ndarray]:
        import lance

        for batch in lance.dataset(str(path)).to_batches(batch_size=BLOCK):
            yield _rows(batch.column(0))

    def gather(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        import lance

        dataset = lance.dataset(str(path))

        def pick(rows: np.ndarray) -> np.ndarray:
            return _rows(dataset.take(rows)["x"].combine_chunks())

        return pick

    def largest(self, path: Path) -> Path:
        return sorted((path / "data").iterdir())[0]


class PlainZarr:
    name = "Zarr, defaults"

    def write(self, path: Path, rows: np.ndarray, stop: int | None = None) -> None:
        array = zarr.create_array(path, shape=rows.shape, chunks=(BLOCK, rows.shape[1]), dtype=rows.dtype)
        for number, block in enumerate(blocks(rows, stop)):
            array[number * BLOCK : number * BLOCK + len(block)] = block

    def read(self, path: Path) -> Iterator[np.ndarray]:
        array = zarr.open_array(path, mode="r")
        for start in range(0, array.shape[0], BLOCK):
            yield np.asarray(array[start : start + BLOCK])

    def gather(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        array = zarr.open_array(path, mode="r")
        return lambda rows: np.asarray(array.oindex[rows])

    def largest(self, path: Path) -> Path:
        return path / "c/1/0"


def _batch(block: np.ndarray) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), block.shape[1])})


def _rows(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy().reshape(len(column), -1)


FORMATS: dict[str, Any] = {kind.name: kind() for kind in (Ours, Memmap, Parquet, Lance, PlainZarr)}


def installed() -> list[str]:
    names = list(FORMATS)
    try:
        import lance  # noqa: F401
    except ImportError:
        names.remove("Lance")
    return names


def outcome(form: Any, path: Path, rows: np.ndarray) -> str:
    """What a reader of the whole gets to see."""
    try:
        got = np.concatenate(list(form.read(path)))
    except GstdsError as error:
        return f"error: {type(error).__name__}: {str(error).splitlines()[-1].strip()}"[:160].replace(str(path), "STORE")
    except Exception as error:  # Which one is the result.
        return f"error: {type(error).__name__}"
    if got.shape == rows.shape and np.array_equal(got, rows):
        return "right rows"
    wrong = rows.shape[0] if got.shape != rows.shape else int((~(got == rows).all(axis=1)).sum())
    return f"WRONG ROWS WITHOUT A WORD: {wrong:,} of {len(rows):,}"


def damage(name: str, folder: Path, rows: np.ndarray) -> dict[str, str]:
    """What a format's reader says to a flipped byte, a deleted part, and a writer that was killed half way."""
    form, found = FORMATS[name], {}
    path = folder / "flipped"
    form.write(path, rows)
    victim = form.largest(path)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    found["flipped byte"] = outcome(form, path, rows)
    path = folder / "deleted"
    form.write(path, rows)
    if form.largest(path) == path:
        found["deleted part"] = "has no parts: one file"
    else:
        form.largest(path).unlink()
        found["deleted part"] = outcome(form, path, rows)
    path = folder / "killed"
    np.save(folder / "rows.npy", rows)
    words = [sys.executable, __file__, "--kill-writing", name, str(path), str(folder / "rows.npy")]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    if killed.returncode != -signal.SIGKILL:
        raise RuntimeError(f"{name}: the writer was not killed: {killed.stderr}")
    found["killed half way"] = outcome(form, path, rows)
    again = ""
    try:
        form.write(path, rows)
    except Exception as error:  # Which one is the result.
        again = f"refused ({type(error).__name__}); what is there: "
    found["killed, then the same again"] = again + outcome(form, path, rows)
    return found


def consume(pieces: Iterator[np.ndarray]) -> None:
    for _piece in pieces:
        pass


def against_files(path: Path, trials: int) -> dict[str, Any]:
    """Ours against plain file operations on the same bytes."""
    ours = FORMATS["gstds-cache"]
    store = EmbeddingStore(path, access="window", memory_budget=0)
    files = [path / layout.object_key(shard) for shard in range(store.spec.shards)]

    def plain_read() -> None:
        for file in files:
            data = file.read_bytes()
            google_crc32c.value(data)

    def plain_hash() -> None:
        for file in files:
            hashlib.sha256(file.read_bytes()).hexdigest()

    def zarr_read() -> None:
        array = zarr.open_group(path, mode="r")["embeddings"]
        for shard in range(store.spec.shards):
            array[shard * BLOCK : (shard + 1) * BLOCK]

    return interleaved(
        trials,
        read=lambda: consume(store.shard(shard) for shard in range(store.spec.shards)),
        open_and_read=lambda: consume(ours.read(path)),
        plain_read_and_crc32c=plain_read,
        read_by_zarr=zarr_read,
        verify_full=lambda: verify(path, "full"),
        sha256_of_files=plain_hash,
    )


def against_memmap(path: Path, rows: np.ndarray, folder: Path, trials: int) -> dict[str, Any]:
    """An epoch of 512-row float32 batches: by window, by mirror, and gathered from a memmap."""
    window = EmbeddingStore(path, access="window", memory_budget=WINDOW_SHARDS * BLOCK * rows.shape[1] * 2)
    mirror = EmbeddingStore(path, access="mirror")
    np.save(folder / "peer.npy", rows)
    memmap = np.load(folder / "peer.npy", mmap_mode="r")
    orders = {
        name: [names for names, _ in store.shuffled(BATCH, seed=0, epoch=0)]
        for name, store in (("window", window), ("mirror", mirror))
    }
    if any(not np.array_equal(np.sort(np.concatenate(order)), np.arange(len(rows))) for order in orders.values()):
        raise RuntimeError("an epoch does not have every row once")
    out = np.empty((BATCH, rows.shape[1]), np.float32)

    def memmap_gather(order: list[np.ndarray]) -> None:
        for names in order:
            out[: len(names)] = memmap[names]

    def mirror_gather() -> None:
        for names in orders["mirror"]:
            mirror.gather(names, out[: len(names)])

    return interleaved(
        trials,
        window_epoch=lambda: consume(batch for _, batch in window.shuffled(BATCH, seed=0, epoch=0)),
        memmap_of_window_order=lambda: memmap_gather(orders["window"]),
        mirror_gather=mirror_gather,
        memmap_of_mirror_order=lambda: memmap_gather(orders["mirror"]),
    )


def beside_others(rows: np.ndarray, folder: Path, trials: int) -> dict[str, Any]:
    """Writing, reading all, and 512 random rows, in each format."""
    rng, names = np.random.default_rng(1), installed()
    size = rows.nbytes / 1e6
    numbers = iter(range(10**6))
    fresh: dict[str, Path] = {}

    def write(name: str) -> None:
        fresh[name] = folder / f"{name.split(maxsplit=1)[0]}{next(numbers)}"
        FORMATS[name].write(fresh[name], rows)

    written = interleaved(trials, **{name: lambda name=name: write(name) for name in names})
    read = interleaved(trials, **{name: lambda name=name: consume(FORMATS[name].read(fresh[name])) for name in names})
    pick = {name: FORMATS[name].gather(fresh[name]) for name in names}
    some = rng.integers(0, len(rows), BATCH)
    for name in names:
        if not np.array_equal(pick[name](some), rows[some]):
            raise RuntimeError(f"{name}: gathered other rows")
    gathered = interleaved(
        trials, **{name: lambda name=name: pick[name](rng.integers(0, len(rows), BATCH)) for name in names}
    )
    return {
        name: {
            "write_MB_per_s": size / written[name]["median"],
            "read_MB_per_s": size / read[name]["median"],
            "gather_512_ms": gathered[name]["median"] * 1e3,
        }
        for name in names
    }


def over(times: dict[str, Any], one: str, other: str) -> dict[str, float]:
    """Ratio of two times of the same trials: median, min, max."""
    ratios = sorted(a / b for a, b in zip(times[one]["trials"], times[other]["trials"], strict=True))
    return {"median": ratios[len(ratios) // 2], "min": ratios[0], "max": ratios[-1]}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=200_000)
    made.add_argument("--dim", type=int, default=512)
    made.add_argument("--kill-writing", nargs=3, metavar=("FORMAT", "PATH", "ROWS"), help="write half, and die")
    arguments = made.parse_args()
    if arguments.kill_writing:
        name, path, source = arguments.kill_writing
        rows = np.load(source)
        FORMATS[name].write(Path(path), rows, stop=len(rows) // BLOCK // 2)
        return
    if arguments.smoke:
        arguments.rows, arguments.dim, arguments.trials = 5 * BLOCK, 16, 2
    rows = make_rows(arguments.rows, arguments.dim)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        FORMATS["gstds-cache"].write(folder / "store", rows)
        files = against_files(folder / "store", arguments.trials)
        epochs = against_memmap(folder / "store", rows, folder, arguments.trials)
        formats = beside_others(rows, folder, arguments.trials)
        few = rows[: 8 * BLOCK]
        features = {}
        for form in installed():
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                features[form] = damage(form, Path(inner), few)
    report(
        "store",
        {
            "rows": arguments.rows,
            "dim": arguments.dim,
            "dtype": "float16",
            "MB": rows.nbytes / 1e6,
            "seconds": files | epochs,
            "ratios": {
                "read_speed_over_plain_read_and_crc32c": over(files, "plain_read_and_crc32c", "read"),
                "open_and_read_speed_over_plain_read_and_crc32c": over(files, "plain_read_and_crc32c", "open_and_read"),
                "zarr_read_speed_over_plain_read_and_crc32c": over(files, "plain_read_and_crc32c", "read_by_zarr"),
                "verify_full_time_over_sha256": over(files, "verify_full", "sha256_of_files"),
                "window_time_over_memmap": over(epochs, "window_epoch", "memmap_of_window_order"),
                "mirror_time_over_memmap": over(epochs, "mirror_gather", "memmap_of_mirror_order"),
            },
            "formats": formats,
            "damage": features,
        },
        arguments,
    )


if __name__ == "__main__":
    main()
