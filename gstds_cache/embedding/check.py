"""Does a store hold what its specification says? Some rows are embedded again and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from gstds_cache.config import DEVICE, SAMPLE_ROWS, SAMPLE_SEED
from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.repeatable import why_items_differ
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.decoding import pixels_of
from gstds_cache.embedding.determinism import DeterminismCheck
from gstds_cache.embedding.shard import NO_FEATURES
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.seeding import rng_for
from gstds_cache.store import layout
from gstds_cache.store.metadata import Problem
from gstds_cache.store.reader import EmbeddingStore

TOLERANCE = 1e-3
"""Largest 1 - cosine between a stored row and the same image embedded again. Storing as float16 costs 1e-7, another
device's arithmetic (TF32, other kernels) up to about 1e-5; another resize filter alone costs more than 1e-2."""


@dataclass(frozen=True)
class SampleReport:
    """What a comparison of some rows found.

    Attributes:
        rows: Rows that were compared.
        cosine_min: Smallest cosine between a stored row and the same image embedded again; NaN where no row has one.
        problems: One for each row beyond ``TOLERANCE``, or whose image decodes now and did not then, or the reverse.
    """

    rows: tuple[int, ...]
    cosine_min: float
    problems: tuple[Problem, ...]


def check_sample(
    store: EmbeddingStore,
    source: ImageSource,
    encoder: Encoder,
    *,
    rows: int = SAMPLE_ROWS,
    seed: int = SAMPLE_SEED,
    device: str = DEVICE,
) -> SampleReport:
    """Embed some rows again and compare them with the stored ones by cosine.

    Args:
        store: The store; it need not be complete.
        source: The data set it was made of.
        encoder: The model it was made with.
        rows: How many rows, drawn without replacement from those that are committed.
        seed: Which rows.
        device: Where the model runs.

    Returns:
        What was found.

    Raises:
        EncoderError: The model's rows mean nothing.
        ChunkCorruptError: A shard that is read is damaged.
    """
    committed = np.flatnonzero(store.valid != layout.MISSING)
    drawn = np.sort(rng_for(seed, "sample").choice(committed, min(rows, len(committed)), replace=False))
    encoder = encoder.to(resolve_device(device))
    # Else the store is blamed for the model.
    DeterminismCheck(source, encoder, dtype=store.spec.dtype).run(store.spec.batch_size)
    problems, cosines = [], [float("nan")]
    for first in range(0, len(drawn), store.spec.batch_size):
        part = drawn[first : first + store.spec.batch_size].tolist()
        fresh, reasons = _embed_again(part, source, encoder, store.spec.batch_size)
        for position, row in enumerate(part):
            stored, reason = store.valid[row] == layout.OK, reasons.get(position, "")
            if stored == bool(reason):
                text = f"{_name(source, row)} " + (
                    f"has an embedding, and gets none now: {reason}" if stored else "decodes now, and did not"
                )
                problems.append(_problem(store, row, text))
            elif stored:
                kept = store.gather(np.array([row]), np.empty((1, store.spec.dim), np.float32))[0]
                cosine = float(kept @ fresh[position] / max(float(np.linalg.norm(kept)), 1e-12))
                cosines.append(cosine)
                if not cosine >= 1 - TOLERANCE:
                    text = f"{_name(source, row)}: cosine {cosine:.6f} with the same image embedded again"
                    text += _because(source)
                    problems.append(_problem(store, row, text))
    return SampleReport(
        tuple(drawn.tolist()), float(np.nanmin(cosines)) if len(cosines) > 1 else float("nan"), tuple(problems)
    )


def _embed_again(
    part: list[int], source: ImageSource, encoder: Encoder, batch_size: int
) -> tuple[Float32[np.ndarray, "n D"], dict[int, str]]:
    """Fresh rows of some items, and why those at some places have none."""
    # Padded like the batches of embedding: every forward pass has the same shape.
    pixels = torch.zeros((batch_size, *encoder.input_shape), dtype=torch.uint8)
    reasons: dict[int, str] = {}
    for position, row in enumerate(part):
        try:
            pixels[position] = pixels_of(source, encoder, row)
        except UndecodableError as error:
            reasons[position] = error.reason
    decoded = [position for position in range(len(part)) if position not in reasons]
    fresh = encoder.queue(pixels).cpu()[: len(part)]
    for position in encoder.require_numbers(fresh[decoded], lambda position: _name(source, part[decoded[position]])):
        reasons[decoded[position]] = NO_FEATURES
    return fresh.numpy(), reasons


def _name(source: ImageSource, row: int) -> str:
    return f"row {row} ({source.ids[row]})"


def _because(source: ImageSource) -> str:
    why = why_items_differ(source)
    return f" ({why})" if why else ""


def _problem(store: EmbeddingStore, row: int, text: str) -> Problem:
    shard = row // store.spec.shard_rows
    return Problem(layout.object_key(shard), text, shard)
