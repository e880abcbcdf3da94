"""What a run will need, measured on a few of its images before hours are spent: time, disk, memory, batch size."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data.loading import default_workers, worth_workers
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.decoding import sample_pixels
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import IncompleteError, UsageError
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.store.embed_report import Estimate, size_text

IMAGES = 32
DECODE_SECONDS = 1.0
FORWARD_SECONDS = 1.0
COMMIT_RECORD_BYTES = 600


def estimate_run(
    source: ImageSource,
    encoder: Encoder,
    config: EmbedConfig,
    device: torch.device,
    remaining_rows: int,
    *,
    batch_size: int,
    shard_rows: int,
    known_rows: int = 0,
    committed_rows: int | None = None,
    disk_free: int | None = None,
    looks_at: str = "",
) -> Estimate:
    """Measure decoding and the model on a few evenly spaced images, for some two seconds after the model's warm-up.

    On a CPU decoding and the model share the cores, so the images per second are ``1 / (1/forward + 1/(workers x
    decode))``; beside a GPU they are the smaller of the two.

    Args:
        source: The data set.
        encoder: The reference model; it is moved to ``device``.
        config: How the data set is embedded.
        device: Where.
        remaining_rows: Rows that are left.
        batch_size: Images per forward pass.
        shard_rows: Rows per shard.
        known_rows: How many of those that are left need not be embedded, since another store has them.
        committed_rows: Rows that are committed; None where those are all but ``remaining_rows``.
        disk_free: Bytes free where the store is, if known.
        looks_at: The size of the pictures that the model looks at, and why, in words.

    Returns:
        What the rest of the data set needs.
    """
    workers = workers_for(source, encoder, config.workers, device)
    decode, pixels = _decode_rate(source, encoder)
    images = pixels[torch.arange(batch_size) % len(pixels)]
    with _peak_memory(device) as vram:
        forward = _forward_rate(encoder.to(device), images)
    # Of a device that decodes, the rate is what it decodes, and its workers read.
    together = decode if encoder.spec.preprocessing.decoder != "pillow" else max(workers, 1) * decode
    overlap = device.type == "cuda" and workers > 0
    rate = min(forward, together) if overlap else 1 / (1 / forward + 1 / together)
    shard_bytes = shard_rows * row_bytes(encoder, config)
    # Two blocks (one filling, one being committed), what is written of it and read back; batches decoded ahead.
    buffers = 4 * shard_bytes + (2 * workers + 2) * images.numel()
    return Estimate(
        items=len(source),
        committed=len(source) - remaining_rows if committed_rows is None else committed_rows,
        images=remaining_rows - known_rows,
        batch_size=batch_size,
        workers=workers,
        device=device.type,
        decode_per_second=decode,
        forward_per_second=forward,
        images_per_second=rate,
        seconds=(remaining_rows - known_rows) / rate,
        disk_bytes=disk_bytes(source, remaining_rows, shard_rows, row_bytes(encoder, config)),
        disk_free=disk_free,
        ram_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        + buffers,
        ram_free=_free_memory(),
        vram_bytes=vram.get("used"),
        vram_free=vram.get("free"),
        decoder=encoder.spec.preprocessing.decoder,
        looks_at=looks_at,
    )


def row_bytes(encoder: Encoder, config: EmbedConfig) -> int:
    """Bytes of one embedding in the store."""
    return encoder.spec.dim * np.dtype(config.dtype).itemsize


def workers_for(source: ImageSource, encoder: Encoder, asked: int | None, device: torch.device) -> int:
    """The processes that decode: as ``asked``, or as fits the machine; none for a few small images."""
    if asked is not None:
        return asked
    return worth_workers(source, max(encoder.input_shape[1:]), default_workers(device))


def disk_bytes(source: ImageSource, remaining_rows: int, shard_rows: int, of_a_row: int) -> int:
    """What is still to be written: whole shards with their commit records and, for a new store, the list of items."""
    shards = -(-remaining_rows // shard_rows)
    size = shards * (shard_rows * of_a_row + COMMIT_RECORD_BYTES)
    if remaining_rows == len(source):
        some = [source.ids[row] for row in np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int).tolist()]
        name = sum(len(item.encode()) for item in some) / len(some)
        # items.arrow: an offset, the name, 32 bytes of hash and the label; then label and valid once more as arrays
        size += 4096 + round(len(source) * (4 + name + 32 + 8 + 8 + 1))
    return size


def require_disk(need: int, free: int | None, *, location: str) -> None:
    """Refuse a run whose rows cannot fit.

    Raises:
        IncompleteError: ``free`` is known, and below ``need``.
    """
    if free is not None and free < need:
        raise IncompleteError(
            f"{location}: got {size_text(free)} of free disk, expected at least {size_text(need)} for the rows that "
            "are left",
            hint="no image was embedded. Make room and run the same command again, or give a `cache` on another disk",
        )


def fitting_batch_size(
    encoder: Encoder,
    device: torch.device,
    batch_size: int,
    notify: Notify | None = None,
    attempt: Callable[[int], object] | None = None,
) -> int:
    """The largest of ``batch_size``, a half of it, a quarter, ... that the device has memory for.

    Where the system promises memory that it does not have (Linux, for the CPU), a batch may seem to fit that does not.

    Args:
        encoder: The reference model; it is moved to ``device``.
        device: Where it runs.
        batch_size: Images per forward pass to begin with.
        notify: Called with one line for every half.
        attempt: Runs the model with so many images; black ones by default.

    Returns:
        A batch size, 1 at least.

    Raises:
        UsageError: The model does not fit, or not with one image.
    """
    attempt = attempt or (
        lambda size: encoder.queue(torch.zeros((size, *encoder.input_shape), dtype=torch.uint8)).cpu()
    )
    while not _fits(encoder, device, batch_size, attempt):
        if batch_size == 1:
            raise UsageError(
                f"out of memory: {encoder.spec.model} does not fit on {device} with a single image",
                hint="end what else uses that memory, or give a smaller `model`, or `device='cpu'`",
            )
        if notify is not None:
            notify(f"batch size {batch_size} does not fit the memory of {device}: trying {batch_size // 2}")
        batch_size //= 2
    return batch_size


def _fits(encoder: Encoder, device: torch.device, batch_size: int, attempt: Callable[[int], object]) -> bool:
    try:
        encoder.to(device)
        attempt(batch_size)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    if not fits and device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _decode_rate(source: ImageSource, encoder: Encoder) -> tuple[float, torch.Tensor]:
    """Images per second of reading and decoding in this process or on the device, and pixels of those that decode."""
    rows = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(int)).tolist()
    # The middle before the quarters before the eighths: wherever time is up, what was measured lies evenly.
    order = [rows[i] for i in sorted(range(len(rows)), key=lambda i: f"{i:06b}"[::-1])]
    rate, pixels = sample_pixels(source, encoder, order, DECODE_SECONDS)
    return rate, torch.stack(pixels or [torch.zeros(encoder.input_shape, dtype=torch.uint8)])


def _forward_rate(encoder: Encoder, images: torch.Tensor) -> float:
    """Images per second of the model alone; its first pass counts only where it takes so long that it has to do."""

    def seconds() -> float:
        begun = time.perf_counter()
        encoder.embed(images).cpu()
        return time.perf_counter() - begun

    passes = [seconds()]
    if passes[0] < FORWARD_SECONDS:
        passes = []
        while sum(passes) < FORWARD_SECONDS and len(passes) < 100:
            passes.append(seconds())
    return len(passes) * len(images) / sum(passes)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure GPU memory.

    Yields:
        What is filled in at the end: the most that was ``used``, and how much is ``free`` for this process.
    """
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["used"] = torch.cuda.max_memory_allocated(device)
        found["free"] = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _free_memory() -> int | None:
    """Memory this process has and can still get, within what its container may use; None where nobody says."""
    limits = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    if not limits:
        return None
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return max(0, min(limits)) + resident
