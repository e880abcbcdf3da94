"""By how much memory rises while embedding and reading, against the number of rows.

    python benchmarks/bench_memory.py [--rows 10000 100000 1000000] [--files 10000 100000]

Each measurement is a process of its own. The encoder is synthetic (a mean over patches of 8 x 8 images), and so are the
images of ``embed``, which are made on the fly: what grows with the rows is ours, the manifest (ids, hashes, labels) and
nothing of the embeddings, which exceed the stated budget many times over. The names that the synthetic data set holds
are its own and not counted. ``folder`` counts everything: it lists, hashes and embeds a folder of image files, and
keeps their hashes; ``folder_hit`` is the same again, when all is embedded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_hit import make_images
from harness import parser, report
from PIL import Image
from torch import nn

from gstds_cache.config import EmbedConfig
from gstds_cache.data.hash_cache import RACY_NS, HashCache
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.store.reader import EmbeddingStore

DIM = 512
BUDGET = 64 << 20
JOBS = ("embed", "window", "mirror")
FOLDER_JOBS = ("folder", "folder_hit")


@dataclass
class Made:
    """Images of one colour, made when they are asked for."""

    count: int
    uri: str = "made"
    kind: str = "made"
    classes: tuple[str, ...] = ()
    mirror_safe: bool = True
    notes: tuple[str, ...] = ()
    files: None = None
    ids: list[str] = field(init=False)
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [f"{row:08d}" for row in range(self.count)]
        self.labels = np.zeros(self.count, np.int64)

    def __len__(self) -> int:
        return self.count

    def payload(self, row: int) -> bytes:
        return row.to_bytes(8, "big")

    def image(self, row: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (row % 251, row // 251 % 251, row // 63001))


class Wide(nn.Module):
    """Features of ``DIM`` numbers that depend on the colour."""

    preprocessing = Preprocessing(resize=8, crop=(8, 8))

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(3, DIM)
        with torch.no_grad():
            self.spread.weight.copy_(torch.linspace(-1, 1, 3 * DIM).view(DIM, 3).sin())
            self.spread.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spread(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    return Wide()


def status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


class Watch:
    """The most anonymous memory of this process, looked up every few milliseconds in a thread."""

    def __init__(self) -> None:
        self.start = self.most = status("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, status("RssAnon"))

    def rise(self) -> int:
        self._over.set()
        self._thread.join()
        return max(self.most, status("RssAnon")) - self.start


def child(job: str, rows: int, store: str) -> None:
    torch.set_num_threads(1)
    source: ImageSource | None = Made(rows) if job == "embed" else None
    # From here on the kernel's high-water mark is that of the job, above what the libraries and the data set take.
    Path("/proc/self/clear_refs").write_text("5")
    begun, start, watch = time.perf_counter(), status("VmRSS"), Watch()
    if job in {"embed", "folder"}:
        hash_cache = None
        if source is None:
            hash_cache = HashCache(Path(store).with_suffix(".hashes"))
            source = open_source(f"imagefolder:{Path(store).with_suffix('.images')}", hash_cache=hash_cache)
        config = EmbedConfig(model="bench_memory:build", batch_size=256, workers=0, device="cpu")
        embed_dataset(source, config, where=store, hash_cache=hash_cache)
    else:
        opened, seen = EmbeddingStore(store, access=job, memory_budget=BUDGET), 0
        for names, batch in opened.shuffled(512, seed=0, epoch=0):
            seen += len(names) * bool(np.isfinite(batch).all())
        if seen != rows:
            raise RuntimeError(f"{seen} of {rows} rows read")
    seconds = time.perf_counter() - begun
    # Mapped pages (a mirror's, the items') count as the process's while they are in memory; the kernel takes them back
    # at will. Anonymous memory it cannot take back.
    rise = {"anonymous": watch.rise(), "with_mapped_pages": status("VmHWM") - start}
    print(json.dumps({**rise, "seconds": seconds}))


def measure(job: str, rows: int, store: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", job, "--rows", str(rows), "--store", str(store)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    made.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000])
    made.add_argument("--child", choices=["embed", "folder", "window", "mirror"])
    made.add_argument("--store")
    arguments = made.parse_args()
    if arguments.child:
        child(arguments.child, arguments.rows[0], arguments.store)
        return
    if arguments.smoke:
        arguments.rows, arguments.files = [500, 1000], [64]
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            store = Path(folder) / f"{rows}.store"
            found[rows] = {job: measure(job, rows, store) for job in JOBS}
        for rows in arguments.files:
            store = Path(folder) / f"{rows}f.store"
            make_images(store.with_suffix(".images"), rows)
            time.sleep(RACY_NS / 1e9 + 0.1)  # Digests of younger files are not kept.
            found.setdefault(rows, {}).update({name: measure("folder", rows, store) for name in FOLDER_JOBS})
    report(
        "memory",
        {
            "dim": DIM,
            "bytes_per_embedding": DIM * 2,
            "memory_budget": BUDGET,
            "MB_of_embeddings": {rows: rows * DIM * 2 / 1e6 for rows in arguments.rows},
            "rise_bytes": found,
            "bytes_per_further_row": {
                job: per_further_row(found, job, rows)
                for jobs, rows in ((JOBS, arguments.rows), (FOLDER_JOBS, arguments.files))
                for job in jobs
            },
        },
        arguments,
    )


def per_further_row(found: dict[int, dict[str, Any]], job: str, rows: list[int]) -> dict[str, dict[str, float]]:
    """By how many bytes memory rises with each row from one number of rows to the next."""
    return {
        f"{few} to {many}": {
            kind: (found[many][job][kind] - found[few][job][kind]) / (many - few)
            for kind in ("anonymous", "with_mapped_pages")
        }
        for few, many in pairwise(rows)
    }


if __name__ == "__main__":
    main()
