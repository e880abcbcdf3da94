"""Embedding speed against its physical limit: the bare forward pass and the bare decode of the same images.

    python benchmarks/bench_embed.py DATASET [--images 1648] [--trials 3]

On few cores decode and forward share them, so the limit is 1 / (1/forward + 1/decode) images per second. The forward
pass in it is the faster of two: with OpenMP threads that soon sleep while they wait, as gstds-embed sets them, and with
threads that spin, OpenMP's default. Also measured: the forward pass in a process that left the C allocator at its
defaults, which is why the commands call keep_freed_memory(); CPU seconds of the pass over those of the model as its
library makes it, with batch normalisation in layers of its own, in turn; and which share of the embedding time was
decoding, the model, waiting for images, and committing. The default number of images fills one shard of 4 MB of the
default model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from gstds_cache.runtime.openmp import wait_briefly

if "--default-threads" in sys.argv:
    os.environ.pop("GOMP_SPINCOUNT", None)
else:
    wait_briefly()  # before torch is loaded, as in gstds-embed

import numpy as np
import torch
from harness import parser, report, spread

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.data.split import Subset
from gstds_cache.embedding.job import BATCH_SIZE
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders import factory
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder, with_size
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.store.embed_report import EmbedReport

SHARES = ("decode", "forward", "commit", "waiting")


def forward_rate(model: str, batch_size: int, batches: int) -> float:
    """Images per second of the bare forward pass on random pixels."""
    encoder = open_encoder(model, allow_untrained=True)
    pixels = torch.randint(0, 256, (batch_size, *encoder.input_shape), dtype=torch.uint8)
    encoder.embed(pixels)
    begun = time.perf_counter()
    for _ in range(batches):
        encoder.embed(pixels)
    return batches * batch_size / (time.perf_counter() - begun)


def folded_over_not(model: str, batch_size: int, batches: int) -> float:
    """CPU seconds of the forward pass over those of the same model without anything folded, batch by batch in turn."""
    seconds = [0.0, 0.0]
    encoders = [open_encoder(model, allow_untrained=True)]
    with mock.patch.object(factory, "folded", lambda module, *_: module):
        encoders.append(open_encoder(model, allow_untrained=True))
    pixels = torch.randint(0, 256, (batch_size, *encoders[0].input_shape), dtype=torch.uint8)
    for batch in range(batches + 1):
        for number, encoder in enumerate(encoders):
            begun = time.process_time()
            encoder.embed(pixels)
            seconds[number] += time.process_time() - begun if batch else 0.0
    return seconds[0] / seconds[1]


def fresh_forward_rate(model: str, batches: int, flag: str) -> float:
    """The same in a process of its own, with something left at its default."""
    words = [sys.executable, __file__, "--bare-forward", str(batches), "--model", model, flag]
    return float(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))


def decode_rate(source: ImageSource, encoder: Encoder, images: int | None = None) -> float:
    """Images per second of reading and decoding in one process; of all, or of so many evenly spaced ones."""
    rows = np.unique(np.linspace(0, len(source) - 1, images or len(source)).astype(np.int64)).tolist()
    begun = time.perf_counter()
    for row in rows:
        try:
            encoder.spec.preprocessing.pixels(source.image(row))
        except UndecodableError:
            continue
    return len(rows) / (time.perf_counter() - begun)


def some_of(uri: str, images: int) -> Subset:
    """Evenly spaced images of a data set."""
    whole = open_source(uri)
    rows = np.linspace(0, len(whole) - 1, min(images, len(whole))).astype(np.int64)
    return Subset(base=whole, uri=uri, rows=rows, ids=tuple(whole.ids[row] for row in rows), labels=whole.labels[rows])


def at_own_size(model: str) -> str:
    """The name of a model that looks at its own size whatever the images': as its bare forward pass does."""
    encoder = open_encoder(model, allow_untrained=True)
    return model if encoder.sizes is None else with_size(model, encoder.input_shape[1])


def embed(source: ImageSource, model: str, workers: int | None, shard_rows: int | None) -> EmbedReport:
    """One run into a new store."""
    with tempfile.TemporaryDirectory() as folder:
        config = EmbedConfig(
            model=at_own_size(model),
            workers=workers,
            shard_rows=shard_rows,
            allow_untrained=True,
            device="cpu",
            decode="exact",
        )
        return embed_dataset(source, config, where=Path(folder) / "store").report


def main() -> None:
    made = parser(__doc__)
    made.add_argument("dataset", nargs="?", default="digits")
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--images", type=int, default=1648)
    made.add_argument("--workers", type=int, help="[default: as gstds-embed chooses]")
    made.add_argument("--shard-rows", type=int, help="[default: 4 MB]")
    made.add_argument("--bare-forward", type=int, metavar="BATCHES", help="only print the bare images/s")
    made.add_argument("--default-allocator", action="store_true", help="for --bare-forward")
    made.add_argument("--default-threads", action="store_true", help="for --bare-forward")
    arguments = made.parse_args()
    batch_size = BATCH_SIZE["cpu"]
    if arguments.bare_forward:
        if not arguments.default_allocator:
            keep_freed_memory()
        print(json.dumps(forward_rate(arguments.model, batch_size, arguments.bare_forward)))
        return
    if arguments.smoke:
        arguments.images, arguments.model, arguments.trials = 32, "timm:test_resnet", 1
    source = some_of(arguments.dataset, arguments.images)
    encoder = open_encoder(arguments.model, allow_untrained=True)
    keep_freed_memory()
    model, batches = arguments.model, max(2, arguments.images // batch_size // 2)
    rates: dict[str, list[float]] = {}
    folding: list[float] = []
    runs: list[EmbedReport] = []
    for _ in range(arguments.trials):
        runs.append(embed(source, model, arguments.workers, arguments.shard_rows))
        for name, rate in {
            "decode": decode_rate(source, encoder),
            "forward": forward_rate(model, batch_size, batches),
            "embed": runs[-1].images_per_second,
            "forward_default_threads": fresh_forward_rate(model, batches, "--default-threads"),
            "forward_default_allocator": fresh_forward_rate(model, batches, "--default-allocator"),
        }.items():
            rates.setdefault(name, []).append(rate)
        folding.append(folded_over_not(model, batch_size, batches))
    best = [max(pair) for pair in zip(rates["forward"], rates["forward_default_threads"], strict=True)]
    limits = [1 / (1 / f + 1 / d) for f, d in zip(best, rates["decode"], strict=True)]
    gains = [a / b for a, b in zip(rates["forward"], rates["forward_default_allocator"], strict=True)]
    report(
        "embed",
        {
            "dataset_kind": source.kind,
            "model": model,
            "images": len(source),
            "batch_size": batch_size,
            "workers": runs[-1].workers,
            "shards": runs[-1].shards,
            "images_per_second": {name: spread(values) for name, values in rates.items()},
            "limit_images_per_second": spread(limits),
            "embed_over_limit": spread([a / b for a, b in zip(rates["embed"], limits, strict=True)]),
            "forward_over_forward_with_default_allocator": spread(gains),
            "forward_cpu_seconds_over_without_folding": spread(folding),
            "share_of_embedding_time": {name: spread([run.shares[name] for run in runs]) for name in SHARES},
            "seconds_waited_for_commits": spread([run.seconds["commit_wait"] for run in runs]),
        },
        arguments,
    )


if __name__ == "__main__":
    main()
