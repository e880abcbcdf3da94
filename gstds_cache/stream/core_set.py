"""A core set as a selection: the same rows in every epoch, in another order, a full batch a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from gstds_cache.config import OnceConfig
from gstds_cache.files.digest import digest_of
from gstds_cache.seeding import rng_for
from gstds_cache.selection.guidance_spec import valid_digest
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.schema import Header

ALGORITHM = 1  # raised by whoever changes what the same settings choose


def batches_of(count: int, batch_size: int) -> Int64[np.ndarray, " b1"]:
    """Where the batches of an epoch begin, and the last ends; a remainder below half a batch goes to the last."""
    batches = max(1, (count + batch_size // 2) // batch_size)
    bounds = np.arange(batches + 1, dtype=np.int64) * batch_size
    bounds[-1] = count
    return bounds


def core_set_header(store: EmbeddingStore, count: int, config: OnceConfig) -> Header:
    """What the selection says of itself; known before a row is chosen.

    Args:
        store: The store.
        count: Rows of the core set.
        config: How they are chosen.
    """
    settings: dict[str, Any] = {
        "rule": f"once {config.method}",
        "once": count,
        "balance": config.balance,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "seed": config.seed,
        **({"hidden": store.hidden_digest} if store.hidden_digest else {}),
    }
    # Where a row has no embedding: once it is repaired, others are chosen.
    valid = {"valid": valid_digest(store)} if store.quarantined else {}
    batches = len(batches_of(count, config.batch_size)) - 1
    return Header(
        cache_fingerprint=store.fingerprint,
        selection_digest=digest_of({"algorithm": ALGORITHM, "cache": store.fingerprint, "select": settings, **valid}),
        items=len(store),
        items_root=store.spec.items_root,
        seed=config.seed,
        epochs=config.epochs,
        batches_per_epoch=batches,
        total_batches=batches * config.epochs,
        total_kept=count * config.epochs,
        kept_per_epoch=[count] * config.epochs,
        settings=settings,
    )


def core_set_batches(rows: Int64[np.ndarray, " n"], of: int, header: Header, start: int = 0) -> Iterator[SelectedBatch]:
    """The batches of a core set.

    Args:
        rows: Its rows, ascending.
        of: Rows that it was chosen from: they are counted as seen, a share in each batch, so that what a run saves is
            counted against an epoch of all of them.
        header: The selection's header.
        start: The first batch.

    Yields:
        The batches in order.
    """
    bounds = batches_of(len(rows), header.settings["batch_size"])
    seen = np.round(bounds * (of / len(rows))).astype(np.int64)
    for seq in range(start, header.total_batches):
        epoch, batch = divmod(seq, header.batches_per_epoch)
        order = rng_for(header.seed, "core-set-order", epoch).permutation(len(rows))
        yield SelectedBatch(
            seq=seq,
            epoch=epoch,
            batch_id=batch,
            n_in=int(seen[batch + 1] - seen[batch]),
            kept=rows[order[bounds[batch] : bounds[batch + 1]]],
            score=None,
            status=Status.NOT_COMPUTED,
            value=float("nan"),
            residual=float("nan"),
        )
