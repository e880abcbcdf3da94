"""Real images packed by the libraries' own writers: embedded, killed once, resumed, and compared to the last byte.

    python benchmarks/ways_in_for_real.py FOLDER... [--images 2000] [--model MODEL]

The first images of each FOLDER of class folders, evenly over its classes, are packed by webdataset's ``ShardWriter``,
``datasets`` (``to_parquet``, ``save_to_disk``), pyarrow, as a list of paths, and into a bucket (moto on loopback). Each
is embedded once without a disturbance, and once killed by SIGKILL when a third of its shards is committed, and begun
again. Then ``same_bytes`` says whether all objects of both stores are the same, ``rows_of_class_folders`` whether the
embeddings are those of the class folders the images come from, and ``hit`` whether one more run finds all of it done.

Every run is a process of its own, forked before anything is opened.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm  # noqa: F401 - loaded here, and so not in each process that is forked
import torch
from harness import parser, report
from PIL import Image

import gstds_cache
import gstds_cache.embedding.run  # noqa: F401
import gstds_cache.encoders.factory  # noqa: F401
from gstds_cache.store import layout
from gstds_cache.store.reader import EmbeddingStore

BUCKET = "images"
SHARD, BATCH = 32, 8
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Item:
    """An image file: its class, its name, and its bytes."""

    label: str
    name: str
    data: bytes

    @property
    def ending(self) -> str:
        return self.name.rpartition(".")[2].lower()


def class_folders(folder: Path, items: Sequence[Item]) -> str:
    for row, item in enumerate(items):
        path = folder / item.label / f"{row:06d}.{item.ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
    return f"imagefolder:{folder}"


def list_of_paths(folder: Path, items: Sequence[Item]) -> str:
    class_folders(folder, items)
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([f"{item.label}/{row:06d}.{item.ending}", item.label] for row, item in enumerate(items))
    return f"list:{folder / 'list.csv'}"


def shard_writer(folder: Path, items: Sequence[Item]) -> str:
    """Tar shards by webdataset's own writer, which cuts them by count."""
    import webdataset

    classes, each = sorted({item.label for item in items}), max(2, len(items) // 3)
    with (
        redirect_stdout(io.StringIO()),
        webdataset.ShardWriter(f"{folder}/shard-%06d.tar", maxcount=each) as writer,
    ):
        for row, item in enumerate(items):
            writer.write({"__key__": f"{row:09d}", item.ending: item.data, "cls": classes.index(item.label)})
    return f"webdataset:{folder}/shard-{{000000..{(len(items) - 1) // each:06d}}}.tar"


def parquet_by_pyarrow(folder: Path, items: Sequence[Item]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [item.data for item in items], "label": [item.label for item in items]})
    pq.write_table(table, folder / "images.parquet")
    return f"parquet:{folder / 'images.parquet'}"


def hugging_face(folder: Path, items: Sequence[Item], *, save: bool) -> str:
    import datasets

    datasets.disable_progress_bars()
    names = sorted({item.label for item in items})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {
        "image": [{"bytes": item.data, "path": None} for item in items],
        "label": [item.label for item in items],
    }
    dataset = datasets.Dataset.from_dict(columns, features=features)
    if save:
        dataset.save_to_disk(str(folder / "saved"))
        return f"hf:{folder / 'saved'}"
    dataset.to_parquet(str(folder / "train.parquet"))
    return f"parquet:{folder}"


def in_bucket(write: Callable[[Path, Sequence[Item]], str], folder: Path, items: Sequence[Item]) -> str:
    """What ``write`` writes, uploaded by boto3."""
    import boto3

    name, prefix = write(folder, items), f"{folder.parent.name}/{folder.name}"
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
    shutil.rmtree(folder)
    return name.replace(str(folder), f"s3://{BUCKET}/{prefix}")


WAYS: dict[str, Callable[[Path, Sequence[Item]], str]] = {
    "class folders": class_folders,
    "tar shards, webdataset.ShardWriter": shard_writer,
    "Parquet, datasets.to_parquet": lambda folder, items: hugging_face(folder, items, save=False),
    "Parquet, pyarrow": parquet_by_pyarrow,
    "datasets.save_to_disk": lambda folder, items: hugging_face(folder, items, save=True),
    "list of paths, csv": list_of_paths,
    "tar shards in a bucket": lambda folder, items: in_bucket(shard_writer, folder, items),
    "class folders in a bucket": lambda folder, items: in_bucket(class_folders, folder, items),
}


def some_of(folder: Path, count: int) -> list[Item]:
    """``count`` image files, evenly over the classes, in the order of class folders."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {path.name: sorted(path.rglob("*.*")) for path in classes}
    for each in range(1, count + 1):  # as many of each class as make up the count
        if sum(min(each, len(files)) for files in found.values()) >= count:
            break
    chosen = [(name, file) for name, files in found.items() for file in files[:each]][:count]
    return [Item(name, str(file.relative_to(folder)), file.read_bytes()) for name, file in chosen]


def made_up(folder: Path, count: int) -> Path:
    """A folder of class folders with small JPEGs."""
    for row in range(count):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        path = folder / "ab"[row % 2] / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


class Child:
    """``work`` in a process forked from this one."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._out, into = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(into)
            return
        code = 1
        try:
            os.close(self._out)
            text = json.dumps(work()).encode()
            with os.fdopen(into, "wb") as file:
                file.write(text)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def result(self) -> Any:
        """What it returned.

        Raises:
            RuntimeError: It failed.
        """
        with os.fdopen(self._out, "rb") as file:
            text = file.read()
        _, status = os.waitpid(self.pid, 0)
        if status:
            raise RuntimeError(f"a process ended with {status}")
        return json.loads(text)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def embed(uri: str, store: Path, model: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    made = gstds_cache.embed(
        uri, store, model=model, batch_size=BATCH, shard_rows=SHARD, workers=1, device="cpu",
        allow_untrained=True, progress=False, notify=lambda _line: None,
    )  # fmt: skip
    done = made.report
    assert done is not None
    rows = hashlib.sha256()
    for shard in range(made.spec.shards):
        rows.update((store / layout.object_key(shard)).read_bytes())
    return {
        "committed_before": done.committed_before,
        "embedded": done.embedded,
        "quarantined": len(done.quarantined),
        "hit": done.cache_hit,
        "fingerprint": made.fingerprint,
        "rows_sha256": rows.hexdigest(),
        "classes": len(EmbeddingStore(store).classes),
    }


def objects_of(store: Path) -> dict[str, str]:
    """Hash of each object of a store; locks and the like begin with a dot."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def killed_after(uri: str, store: Path, model: str, shards: int) -> int:
    """Embed, and end it by SIGKILL once so many shards are committed; returns how many there are then.

    Raises:
        RuntimeError: It was quicker than the look at its commits.
    """
    child = Child(lambda: embed(uri, store, model))
    while len(list((store / "commits").glob("[0-9]*.json"))) < shards:
        if child.ended():
            raise RuntimeError(f"{uri}: ended before it was killed")
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    if (store / layout.COMPLETE).exists() or os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"{uri}: was complete before it was killed")
    return len(list((store / "commits").glob("[0-9]*.json")))


def measure(items: list[Item], work: Path, model: str, ways: Sequence[str]) -> dict[str, Any]:
    shards = -(-len(items) // SHARD)
    result: dict[str, Any] = {"images": len(items), "shards": shards, "ways": {}}
    plain = ""
    for number, (name, write) in enumerate(WAYS.items()):
        if ways and number and not any(part in name for part in ways):
            continue
        place = work / f"way{number}"
        place.mkdir()
        uri = Child(lambda write=write, place=place: write(place, items)).result()
        whole, killed = work / f"{number}-whole.store", work / f"{number}-killed.store"
        once = Child(lambda uri=uri, whole=whole: embed(uri, whole, model)).result()
        plain = plain or once["rows_sha256"]
        committed = killed_after(uri, killed, model, max(1, shards // 3))
        resumed = Child(lambda uri=uri, killed=killed: embed(uri, killed, model)).result()
        before = objects_of(killed)
        again = Child(lambda uri=uri, killed=killed: embed(uri, killed, model)).result()
        result["ways"][name] = {
            "uri": uri.replace(str(place), "FOLDER"),
            "classes": once["classes"],
            "quarantined": once["quarantined"],
            "killed_after_shards": committed,
            "embedded_by_the_second_run": resumed["embedded"],
            "same_bytes": objects_of(whole) == before,
            "objects": len(before),
            "rows_of_class_folders": resumed["rows_sha256"] == plain,
            "hit": again["hit"] and objects_of(killed) == before,
            "fingerprint": once["fingerprint"],
        }
        print(json.dumps({name: result["ways"][name]}), file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
    return result


def start_bucket() -> subprocess.Popen[str]:
    """Start moto's server, which ends when its standard input does; the environment names it."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}", "AWS_ALLOW_HTTP": "true"}

    def make() -> None:
        import boto3

        boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=BUCKET)

    Child(make).result()
    return server


def main() -> None:
    """Run all."""
    made = parser(__doc__)
    made.add_argument("folders", nargs="*", type=Path, help="folders of class folders")
    made.add_argument("--images", type=int, default=2000)
    made.add_argument("--ways", nargs="*", default=[], help="parts of the names of those to try [default: all]")
    made.add_argument("--model", default="timm:tf_efficientnet_lite0?size=32")
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.model = 6 * SHARD, "timm:test_resnet?size=32"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["GSTDS_CACHE"] = str(work / "cache")
        folders = [made_up(work / "made-up", arguments.images)] if arguments.smoke else arguments.folders
        if not folders:
            sys.exit("name a folder of class folders, or --smoke")
        server = start_bucket()
        try:
            results = {}
            for number, folder in enumerate(folders):
                place = work / str(number)
                place.mkdir()
                called = f"{folder.parent.name}/{folder.name}"
                results[called] = measure(some_of(folder, arguments.images), place, arguments.model, arguments.ways)
                shutil.rmtree(place)
        finally:
            server.communicate()
    for data in results.values():
        for one in data["ways"].values():
            assert one["same_bytes"]
            assert one["rows_of_class_folders"]
            assert one["hit"]
    report("ways-in-for-real", {"model": arguments.model, "data": results}, arguments)


if __name__ == "__main__":
    main()
