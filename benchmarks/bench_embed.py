"""Embedding speed against its physical limit: the bare forward pass and the bare decode of the same images.

    python benchmarks/bench_embed.py DATASET [--images 512] [--trials 3]

On few cores decode and forward share them, so the limit is 1 / (1/forward + 1/decode) images per second. Also measured:
the forward pass in a process that left the C allocator at its defaults, which is why the commands call
keep_freed_memory().
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import parser, report, spread

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.sources import open_source
from gstds_cache.data.split import Subset
from gstds_cache.embed.run import BATCH_SIZE, embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.memory import keep_freed_memory


def forward_rate(model: str, batch_size: int, batches: int) -> float:
    """Images per second of the bare forward pass on random pixels."""
    encoder = open_encoder(model, allow_untrained=True)
    pixels = torch.randint(0, 256, (batch_size, *encoder.input_shape), dtype=torch.uint8)
    encoder.embed(pixels)
    begun = time.perf_counter()
    for _ in range(batches):
        encoder.embed(pixels)
    return batches * batch_size / (time.perf_counter() - begun)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("dataset", nargs="?", default="digits")
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--images", type=int, default=512)
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--bare-forward", type=int, metavar="BATCHES", help="only print the bare images/s")
    arguments = made.parse_args()
    batch_size = BATCH_SIZE["cpu"]
    if arguments.bare_forward:
        print(json.dumps(forward_rate(arguments.model, batch_size, arguments.bare_forward)))
        return
    if arguments.smoke:
        arguments.images, arguments.model = 32, "timm:test_resnet"
    whole = open_source(arguments.dataset)
    rows = np.linspace(0, len(whole) - 1, min(arguments.images, len(whole))).astype(np.int64)
    source = Subset(
        base=whole,
        uri=arguments.dataset,
        rows=rows,
        ids=tuple(whole.ids[row] for row in rows),
        labels=whole.labels[rows],
    )
    encoder = open_encoder(arguments.model, allow_untrained=True)
    keep_freed_memory()
    rates: dict[str, list[float]] = {"decode": [], "forward": [], "embed": [], "forward_default_allocator": []}
    for _ in range(1 if arguments.smoke else arguments.trials):
        begun = time.perf_counter()
        for row in range(len(source)):
            try:
                encoder.spec.preprocessing.pixels(source.image(row))
            except UndecodableError:
                continue
        rates["decode"].append(len(source) / (time.perf_counter() - begun))
        rates["forward"].append(forward_rate(arguments.model, batch_size, max(2, arguments.images // batch_size)))
        with tempfile.TemporaryDirectory() as folder:
            config = EmbedConfig(model=arguments.model, workers=arguments.workers, allow_untrained=True, device="cpu")
            done = embed_dataset(source, config, path=Path(folder) / "store")
            rates["embed"].append(done.images_per_second)
        words = [sys.executable, __file__, "--bare-forward", str(max(2, arguments.images // batch_size))]
        fresh = subprocess.run([*words, "--model", arguments.model], capture_output=True, text=True, check=True)
        rates["forward_default_allocator"].append(json.loads(fresh.stdout))
    images = {name: spread(values) for name, values in rates.items()}
    limits = [1 / (1 / f + 1 / d) for f, d in zip(rates["forward"], rates["decode"], strict=True)]
    shares = [rate / limit for rate, limit in zip(rates["embed"], limits, strict=True)]
    gains = [a / b for a, b in zip(rates["forward"], rates["forward_default_allocator"], strict=True)]
    report(
        "embed",
        {
            "dataset_kind": whole.kind,
            "model": arguments.model,
            "images": len(source),
            "batch_size": batch_size,
            "workers": arguments.workers,
            "images_per_second": images,
            "limit_images_per_second": spread(limits),
            "embed_over_limit": spread(shares),
            "forward_over_forward_with_default_allocator": spread(gains),
        },
        arguments,
    )


if __name__ == "__main__":
    main()
