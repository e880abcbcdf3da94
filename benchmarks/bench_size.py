"""What a smaller picture costs: the default model looks at a data set in several sizes, and a probe judges the rows.

    python benchmarks/bench_size.py DATASET [DATASET...] [--images 10000] [--sizes 32 48 64 96 128 224]

For each data set and size: images embedded a second of CPU time (decoding and the model, in one process: other
processes on the machine disturb it less than the clock on the wall), and the share of rows that a cross-fitted linear
probe on the embeddings predicts rightly (two folds, each judged by the probe of the other: selection/linear_probe.py),
with the 95 % interval of its difference from the largest size, row by row (McNemar's).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_embed import some_of
from harness import parser, report, write

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.linear_probe import ProbeSettings, probe_columns


def measured(source: ImageSource, model: str, size: int) -> tuple[dict[str, float], np.ndarray]:
    """Speed and accuracy at one size, and which rows the probe predicts rightly."""
    with tempfile.TemporaryDirectory() as folder:
        config = EmbedConfig(model=f"{model}?size={size}", allow_untrained=True, device="cpu", workers=0)
        begun = time.process_time()
        store = embed_dataset(source, config, where=Path(folder) / "store")
        spent = time.process_time() - begun
        right = probe_columns(store, ProbeSettings(), threads=cores())["predicted"] == store.labels
    return {
        "images_per_cpu_second": round(len(source) / spent, 1),
        "probe_accuracy": round(float(right.mean()), 4),
    }, right


def of_sizes(uri: str, images: int, model: str, sizes: list[int]) -> dict[str, Any]:
    """One data set in all sizes."""
    source = some_of(uri, images)
    found, right = {}, {}
    for size in sorted(sizes):
        found[size], right[size] = measured(source, model, size)
        print(source.kind, size, found[size], file=sys.stderr, flush=True)
    largest = max(sizes)
    for size in sizes:
        gained, lost = (int((a & ~b).sum()) for a, b in ((right[size], right[largest]), (right[largest], right[size])))
        # McNemar's: only rows on which the two differ tell of a difference.
        rates = [found[one]["images_per_cpu_second"] for one in (size, largest)]
        found[size] |= {
            "minus_largest_points": round(100 * (gained - lost) / len(source), 2),
            "margin_points": round(196 * float(np.sqrt(gained + lost)) / len(source), 2),
            "speed_over_largest": round(rates[0] / rates[1], 2),
        }
    sides = [min(source.image(row).size) for row in range(0, len(source), max(1, len(source) // 64))]
    return {"images": len(source), "median_shorter_side": float(np.median(sides)), "sizes": found}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("datasets", nargs="*", metavar="DATASET", default=["digits"])
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--images", type=int, default=10_000)
    made.add_argument("--sizes", type=int, nargs="+", default=[32, 48, 64, 96, 128, 224])
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.model, arguments.sizes = 64, "timm:test_resnet", [32, 48]
    keep_freed_memory()
    results: dict[str, Any] = {}
    for uri in arguments.datasets:
        # Of a path, its last two folders: results tell nothing of where somebody keeps his files.
        name = "/".join(uri.split("/")[-2:])
        results[name] = of_sizes(uri, arguments.images, arguments.model, arguments.sizes)
        if arguments.out:  # what is found is kept if the next takes too long
            write(arguments.out.with_suffix(".part.json"), json.dumps(results, indent=1))
    report("size", {"model": arguments.model, "by_dataset": results}, arguments)


if __name__ == "__main__":
    main()
