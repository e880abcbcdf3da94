"""Ways in: images decoded a second through each kind of data set, over class folders of the same files.

    python benchmarks/bench_ways_in.py FOLDER... [--images 5000] [--trials 5] [--members 1000000]

The first images of each FOLDER of class folders, evenly over its classes, are copied into class folders of their own
and packed by pyarrow and datasets. Every way then hashes and decodes the same bytes in one process, in order and in a
shuffled order, in turns; the page cache is warm. Bytes are also read without being decoded, which takes a twentieth of
the time: the fastest trial of each says what ways in differ by on a machine that others use. ``same_bytes``: whether
all hashes are those of the class folders.

``index``: a tar archive of so many tiny members, in a process of its own: seconds (CPU and clock) to open it as a data
set the first time, and again with the index that was kept; by how much its memory is then larger, for each member.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report, spread
from PIL import Image

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.item_hashes import hash_items
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source

Item = tuple[str, bytes]
"""Name of the class, and bytes of the image file."""


def class_folders(folder: Path, items: Sequence[Item]) -> str:
    for row, (name, data) in enumerate(items):
        path = folder / name / f"{row:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"imagefolder:{folder}"


def file_list(folder: Path, items: Sequence[Item]) -> str:
    class_folders(folder, items)
    rows = (f"{name}/{row:06d}.jpg,{name}\n" for row, (name, _) in enumerate(items))
    (folder / "list.csv").write_text("path,label\n" + "".join(rows))
    return f"list:{folder / 'list.csv'}"


def _table(items: Sequence[Item]) -> Any:
    import pyarrow as pa

    return pa.table({"image": [data for _, data in items], "label": [name for name, _ in items]})


def parquet(folder: Path, items: Sequence[Item], **options: Any) -> str:
    import pyarrow.parquet as pq

    pq.write_table(_table(items), folder / "images.parquet", **options)
    return f"parquet:{folder / 'images.parquet'}"


def arrow(folder: Path, items: Sequence[Item]) -> str:
    import pyarrow as pa

    table = _table(items)
    with pa.ipc.new_file(folder / "images.arrow", table.schema) as writer:
        writer.write_table(table, 1000)
    return f"arrow:{folder / 'images.arrow'}"


def webdataset(folder: Path, items: Sequence[Item]) -> str:
    from webdataset import TarWriter

    classes = sorted({name for name, _ in items})
    for number, start in enumerate(range(0, len(items), 1000)):
        with TarWriter(str(folder / f"{number:06d}.tar")) as writer:
            for row, (name, data) in enumerate(items[start : start + 1000], start):
                writer.write({"__key__": f"{row:09d}", "jpg": data, "cls": classes.index(name)})
    return f"webdataset:{folder}"


def hugging_face(folder: Path, items: Sequence[Item], *, save: bool) -> str:
    import datasets

    datasets.disable_progress_bars()
    names = sorted({name for name, _ in items})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [{"bytes": data, "path": None} for _, data in items], "label": [name for name, _ in items]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    if save:
        dataset.save_to_disk(str(folder / "saved"))
        return f"hf:{folder / 'saved'}"
    dataset.to_parquet(str(folder / "train.parquet"))
    return f"parquet:{folder}"


WAYS: dict[str, Callable[[Path, Sequence[Item]], str]] = {
    "class folders": class_folders,
    "list": file_list,
    "parquet, groups of 500 rows": lambda folder, items: parquet(folder, items, row_group_size=500),
    "parquet, pyarrow's defaults": parquet,
    "parquet by datasets": lambda folder, items: hugging_face(folder, items, save=False),
    "arrow": arrow,
    "webdataset": webdataset,
    "hf, saved to disk": lambda folder, items: hugging_face(folder, items, save=True),
}
"""Each writes the items, in order, into an empty folder, and names the data set."""
if find_spec("datasets") is None:  # the extra hf
    WAYS = {name: write for name, write in WAYS.items() if name not in {"parquet by datasets", "hf, saved to disk"}}


def some_of(folder: Path, count: int) -> list[Item]:
    """``count`` image files of class folders, evenly over the classes, in the order of class folders."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    each = -(-count // len(classes))
    found = [(path.name, file) for path in classes for file in sorted(path.rglob("*.*"))[:each]]
    return [(name, file.read_bytes()) for name, file in found[:count]]


def made_up(folder: Path, count: int) -> Path:
    """A folder of class folders with small JPEGs."""
    for row in range(count):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        path = folder / "ab"[row % 2] / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def decode(source: ImageSource, rows: Sequence[int]) -> float:
    """CPU seconds of decoding ``rows``: other processes on the machine do not count."""
    begun = time.process_time()
    for row in rows:
        source.image(row)
    return time.process_time() - begun


def read(source: ImageSource, rows: Sequence[int]) -> float:
    """CPU seconds of reading the bytes of ``rows``: what is left where ways in differ."""
    begun = time.process_time()
    for row in rows:
        source.payload(row)
    return time.process_time() - begun


def race(items: list[Item], work: Path, trials: int, ways: Sequence[str]) -> dict[str, Any]:
    """Decode the items through every way, in turns, each trial beginning with another one."""
    opened = {}
    for name, write in WAYS.items():
        if ways and name != "class folders" and not any(part in name for part in ways):
            continue
        place = work / f"way{len(opened)}"
        place.mkdir()
        opened[name] = open_source(write(place, items))
    truth = hash_items(opened["class folders"])
    orders = {
        "in order": list(range(len(items))),
        "shuffled": np.random.default_rng(0).permutation(len(items)).tolist(),
    }
    result: dict[str, Any] = {
        "images": len(items),
        "mean_bytes": round(sum(len(data) for _, data in items) / len(items)),
        "same_bytes": {name: bool(np.array_equal(hash_items(source), truth)) for name, source in opened.items()},
    }
    for order, rows in orders.items():
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        reading: dict[str, list[float]] = {name: [] for name in opened}
        for trial in range(trials):
            names = list(opened)
            for name in names[trial % len(names) :] + names[: trial % len(names)]:
                seconds[name].append(decode(opened[name], rows))
                reading[name].append(read(opened[name], rows))
        base = seconds["class folders"]
        result[order] = {
            name: {
                "images_per_cpu_second": round(len(rows) / spread(taken)["median"], 1),
                "over_class_folders": spread([ours / own for ours, own in zip(base, taken, strict=True)]),
                "over_class_folders_least_disturbed": round(min(base) / min(taken), 3),
                "read_microseconds_least_disturbed": round(1e6 * min(reading[name]) / len(rows), 1),
            }
            for name, taken in seconds.items()
        }
    return result


def archive(path: Path, members: int) -> None:
    """A tar archive of so many members of 16 bytes, two a sample; tarfile's headers, patched."""
    head = tarfile.TarInfo(f"{0:09d}.jpg").tobuf(tarfile.USTAR_FORMAT)
    total = int(head[148:154], 8) - sum(head[:13])
    with path.open("wb", 1 << 20) as file:
        for member in range(members):
            name = b"%09d.%s" % (member // 2, (b"jpg", b"cls")[member % 2])
            size, label = (b"%011o" % 16, b"%-16d" % (member % 10))
            header = name + head[13:124] + size + head[135:148]
            sums = total - sum(head[124:135]) + sum(size) + sum(name)
            file.write(header + b"%06o\0 " % sums + head[156:] + label + bytes(496))
        file.write(bytes(1024))


def opening(uri: str, cache: Path) -> dict[str, float]:
    """Time and memory of opening a data set."""
    before, clock, cpu = resident(), time.perf_counter(), time.process_time()
    source = open_source(uri, hash_cache=HashCache(cache))
    seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    assert source.payload(len(source) - 1)
    gc.collect()
    after = resident()
    return {**seconds, "bytes": after[0] - before[0], "peak_bytes": after[1] - before[1], "samples": len(source)}


def resident() -> tuple[int, int]:
    """Memory of this process that is its own, and the most that it had, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) << 10 for name in ("RssAnon", "VmHWM"))  # type: ignore[return-value]


def index(members: int, work: Path) -> dict[str, Any]:
    """Open an archive twice, each time in a process of its own."""
    archive(work / "members.tar", members)
    os.utime(work / "members.tar", (1, 1))
    time.sleep(2.1)  # what changed less than two seconds ago is not trusted
    runs = []
    for _ in range(2):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            runs.append(pool.submit(opening, f"webdataset:{work / 'members.tar'}", work / "cache").result())
    return {
        "members": members,
        **{
            name: {
                "seconds": round(run["seconds"], 2),
                "cpu_seconds": round(run["cpu_seconds"], 2),
                "bytes_a_member": round(run["bytes"] / members, 1),
                "peak_bytes_a_member": round(run["peak_bytes"] / members, 1),
            }
            for name, run in zip(("first", "warm"), runs, strict=True)
        },
    }


def main() -> None:
    """Run the benchmark."""
    made = parser(__doc__)
    made.add_argument("folders", nargs="*", type=Path, help="folders of class folders")
    made.add_argument("--images", type=int, default=5000)
    made.add_argument("--members", type=int, default=1_000_000, help="of the tar archive that is indexed; 0: none is")
    made.add_argument("--ways", nargs="*", default=[], help="parts of the names of those to measure [default: all]")
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.trials, arguments.members = 30, 1, 1000
    with tempfile.TemporaryDirectory() as work:
        folders = [made_up(Path(work) / "made-up", 30)] if arguments.smoke else arguments.folders
        if not folders:
            sys.exit("name a folder of class folders, or --smoke")
        indexed = index(arguments.members, Path(work)) if arguments.members else None
        print(json.dumps({"index": indexed}), file=sys.stderr)
        (Path(work) / "members.tar").unlink(missing_ok=True)
        results = {}
        for number, folder in enumerate(folders):
            place = Path(work) / str(number)
            place.mkdir()
            name = f"{folder.parent.name}/{folder.name}"
            results[name] = race(some_of(folder, arguments.images), place, arguments.trials, arguments.ways)
            print(json.dumps({name: results[name]}), file=sys.stderr)
            shutil.rmtree(place)
    report("ways-in", {"index": indexed, "data": results}, arguments)


if __name__ == "__main__":
    main()
