"""The second run: how long gstds-embed takes to find that everything is embedded already, and that it opens no image.

    python benchmarks/bench_hit.py [--images 100000] [--trials 5]

Small PNG files in 16 class folders are embedded once with a tiny encoder; then the same command is a cache hit. Its
parts are timed in this process: the scan of the folder, the signatures of all files against the kept ones (of
that, looking those up), the Merkle root. Peers, in the same run and with a warm page cache: reading and hashing all
files, as the run would without a hash cache, and the same command on a folder of 16 images, which is what it takes to
start.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from harness import interleaved, parser, report, spread

from gstds_cache.data.hash_cache import RACY_NS, HashCache
from gstds_cache.data.item_hashes import hash_items
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.sources import open_source

ENCODER = """
from torch import nn
from gstds_cache.encoders.preprocessing import Preprocessing

class Tiny(nn.Module):
    preprocessing = Preprocessing(resize=8, crop=(8, 8))

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)

def build():
    return Tiny()
"""
# One byte goes to a file for every image that is opened, also by processes forked from this one.
COUNTED = """
import os, sys
folder, counter = os.path.abspath(sys.argv[1]) + "/", os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def count(event, args):
    if event == "open" and isinstance(args[0], str) and os.path.abspath(args[0]).startswith(folder):
        if args[0].endswith(".png"):
            os.write(counter, b".")
sys.addaudithook(count)
from importlib.metadata import entry_points
sys.argv[:] = sys.argv[3:]
next(iter(entry_points(group="console_scripts", name="gstds-embed"))).load()()
"""


def make_images(folder: Path, count: int) -> None:
    """Write ``count`` different PNG files of 8 x 8 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 25), dtype=np.uint8)
    pixels[:, :, 0] = 0  # The filter of each line: none.
    for label in range(16):
        (folder / f"class{label:02d}").mkdir(parents=True)
    for number in range(count):
        data = zlib.compress(pixels[number].tobytes(), 0)
        path = folder / f"class{number % 16:02d}" / f"{number:07d}.png"
        path.write_bytes(head + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def embed(work: Path, name: str) -> dict[str, Any]:
    """Run gstds-embed on ``work/name``; its result, with the wall time and the images it opened."""
    (work / "opened").write_bytes(b"")
    words = ["gstds-embed", f"imagefolder:{name}", "--model", "bench_encoder:build", "--batch-size", "256"]
    words += ["--device", "cpu", "--json"]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, name, "opened", *words],
        cwd=work,
        env=os.environ | {"GSTDS_CACHE": str(work / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"wall": wall, "opened": (work / "opened").stat().st_size}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=100_000)
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.trials = 320, 1
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "bench_encoder.py").write_text(ENCODER)
        make_images(work / "photos", arguments.images)
        make_images(work / "few", 16)
        time.sleep(RACY_NS / 1e9 + 0.1)  # Files younger than this are read again.
        first, _ = embed(work, "photos"), embed(work, "few")
        hits = [(embed(work, "photos"), embed(work, "few")) for _ in range(arguments.trials)]

        uri, place = f"imagefolder:{work / 'photos'}", work / "cache" / "hashes"
        source = open_source(uri)
        digests = hash_items(source, hash_cache=HashCache(place))

        def root() -> str:
            return DatasetManifest("imagefolder", source.ids, digests, source.labels).root

        seconds = interleaved(
            arguments.trials,
            scan=lambda: open_source(uri),
            signatures=lambda: hash_items(source, hash_cache=HashCache(place)),
            look_up=lambda: HashCache(place).recall(source.files),
            merkle_root=root,
            read_and_hash_all=lambda: hash_items(source),
        )
        same = root() == build_manifest(source).root
    totals = [hit["wall"] for hit, _ in hits]
    report(
        "hit",
        {
            "images": arguments.images,
            "hits": sum(hit["cache_hit"] for hit, _ in hits),
            "images_opened_by_the_first_run": first["opened"],
            "images_opened_by_a_hit": max(hit["opened"] for hit, _ in hits),
            "root_is_that_of_the_files_read": same,
            "first_run_seconds": first["wall"],
            "hit_seconds": spread(totals),
            "hit_seconds_of_16_images": spread([few["wall"] for _, few in hits]),
            "hit_seconds_by_phase": [hit["seconds"] for hit, _ in hits],
            "seconds": seconds,
            "read_and_hash_all_over_signatures": spread(
                [
                    a / b
                    for a, b in zip(
                        seconds["read_and_hash_all"]["trials"], seconds["signatures"]["trials"], strict=True
                    )
                ]
            ),
        },
        arguments,
    )


if __name__ == "__main__":
    main()
