"""How fast each alias of a reference model is, and the default model beside it: forward passes on one core.

    python benchmarks/bench_models.py [--batches 2]

Images a second of CPU time of one thread, which other processes on the machine disturb less than the clock on the wall.
Weights are not trained: all values of a tensor are equal, which changes no speed.
"""

from __future__ import annotations

import sys
import time

import timm
import torch
from harness import limit_threads, parser, report
from torch import nn

from gstds_cache.config import DEFAULT_MODEL
from gstds_cache.encoders.aliases import ALIASES
from gstds_cache.runtime.allocator import keep_freed_memory

BATCH = 4


@torch.inference_mode()
def rate(name: str, size: int, batches: int, **options: object) -> dict[str, float]:
    """Parameters, and images a CPU second."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **options).eval()
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(1 if tensor.dtype == torch.bool else 0.01)
    pixels = torch.rand(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    model(pixels)
    begun = time.process_time()
    for _ in range(batches):
        model(pixels)
    spent = time.process_time() - begun
    return {
        "million_parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "images_per_cpu_second": round(batches * BATCH / spent, 2),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--batches", type=int, default=2)
    arguments = made.parse_args()
    keep_freed_memory()
    limit_threads(1)
    found = {DEFAULT_MODEL: rate(DEFAULT_MODEL.partition(":")[2], 224, arguments.batches)}
    for name, alias in ALIASES.items():
        if not arguments.smoke or name == "dinov2-small":
            found[name] = rate(alias.timm, alias.size, arguments.batches, **alias.options)
            print(name, found[name], file=sys.stderr, flush=True)
    report("models", {"batch_size": BATCH, "models": found}, arguments)


if __name__ == "__main__":
    main()
