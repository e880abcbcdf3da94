"""Does a store hold what its specification says? Some rows are embedded again and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.repeatable import why_items_differ
from gstds_cache.data.source import ImageSource
from gstds_cache.devices import resolve_device
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.seeding import rng_for
from gstds_cache.store import layout
from gstds_cache.store.journal import Problem
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
    store: EmbeddingStore, source: ImageSource, encoder: Encoder, *, rows: int = 64, seed: int = 0, device: str = "auto"
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
        ChunkCorruptError: A unit that is read is damaged.
    """
    there = np.flatnonzero(store.valid != layout.MISSING)
    drawn = np.sort(rng_for(seed, "sample").choice(there, min(rows, len(there)), replace=False))
    encoder = encoder.to(resolve_device(device))
    problems, cosines = [], [float("nan")]
    for first in range(0, len(drawn), store.spec.batch_size):
        part = drawn[first : first + store.spec.batch_size].tolist()
        # Padded like the batches of embedding: every forward pass has the same shape.
        pixels = torch.zeros((store.spec.batch_size, *encoder.input_shape), dtype=torch.uint8)
        for place, row in enumerate(part):
            stored = store.valid[row] == layout.OK
            try:
                pixels[place] = encoder.spec.preprocessing.pixels(source.image(row))
                reason = ""
            except UndecodableError as error:
                reason = error.reason
            if stored == bool(reason):
                text = f"row {row} ({source.ids[row]}) " + (
                    f"has an embedding, and does not decode now: {reason}" if stored else "decodes now, and did not"
                )
                problems.append(_problem(store, row, text))
        fresh = encoder.embed(pixels).cpu().numpy()
        for place, row in enumerate(part):
            if store.valid[row] == layout.OK:
                kept = store.gather(np.array([row]), np.empty((1, store.spec.dim), np.float32))[0]
                cosine = float(kept @ fresh[place] / max(float(np.linalg.norm(kept)), 1e-12))
                cosines.append(cosine)
                if not cosine >= 1 - TOLERANCE and kept.any():
                    text = f"row {row} ({source.ids[row]}): cosine {cosine:.6f} with the same image embedded again"
                    text += _because(source)
                    problems.append(_problem(store, row, text))
    return SampleReport(
        tuple(drawn.tolist()), float(np.nanmin(cosines)) if len(cosines) > 1 else float("nan"), tuple(problems)
    )


def _because(source: ImageSource) -> str:
    why = why_items_differ(source)
    return f" ({why})" if why else ""


def _problem(store: EmbeddingStore, row: int, text: str) -> Problem:
    unit = row // store.spec.unit_rows
    return Problem(layout.object_key(unit), text, unit)
