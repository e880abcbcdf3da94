"""A selection's batches computed again, to see what its stream does not keep: the rows that were dropped.

The stream holds coordinates of kept rows alone. The same store and settings give the same batches, so the others are
computed when somebody asks, and what is kept is compared with what the selection says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int64

from gstds_cache.config import SelectConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError, command_line
from gstds_cache.files.location import LocationLike
from gstds_cache.selection import catalog
from gstds_cache.selection.guidance_spec import GuidanceKey, key_of, labels_digest, parse_guidance
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.schedule import is_file
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.settings import config_arguments
from gstds_cache.store.grown import read_metadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import require_store
from gstds_cache.stream.schema import Header


@dataclass(frozen=True, eq=False)
class SeenBatch:
    """A batch with the rows that were dropped.

    Attributes:
        selection: What stays of it, as stored.
        indices: All its rows of the store, int64 [B].
        stays: Which of them stay, bool [B].
        seen: What the rule saw of them.
        has_spectrum: Whether the rule looked at a graph; without, ``seen.vector`` is zeros.
    """

    selection: SelectedBatch
    indices: Int64[np.ndarray, " B"]
    stays: Bool[np.ndarray, " B"]
    seen: RuleBatch
    has_spectrum: bool


@dataclass(frozen=True, kw_only=True)
class RecomputeSettings:
    """What a selection was made with and does not name itself.

    Attributes:
        device: Where to compute it again.
        guidance: The selection's guidance, which a header names by its digest alone; the kinds without parameters are
            tried by themselves.
        schedule: The selection's schedule, where it was ``file:PATH``: a header names it by the digest of its content.
    """

    device: str = "auto"
    guidance: str | None = None
    schedule: str | None = None


AS_RECORDED = RecomputeSettings()


def store_of(header: Header, where: LocationLike) -> EmbeddingStore:
    """Open a selection's store, as it was when the selection was made, if rows were appended since."""
    return EmbeddingStore(read_metadata(where, state=header.cache_fingerprint))


def selector_of(
    store: EmbeddingStore, header: Header, recompute_settings: RecomputeSettings = AS_RECORDED
) -> BatchSelector:
    """The selector that makes a selection again.

    Args:
        store: The store it was made from.
        header: The selection's header.
        recompute_settings: What the header does not say.

    Returns:
        The selector, on all cores.

    Raises:
        UsageError: This version does not know the selection's settings.
        FingerprintMismatchError: The store is another one, or this version selects otherwise from the same settings.
    """
    require_store(header, fingerprint=store.fingerprint, where=str(store.location))
    if "once" in header.settings:
        raise UsageError(
            "the selection is a core set, chosen once over the whole data set: it has no batches to compute again",
            hint="give a selection that was made batch by batch",
        )
    store = store.with_hidden(header.settings.get("hidden", ""))
    settings = config_arguments(header.settings)
    guidance = settings.pop("guidance", None)
    if is_file(str(settings.get("schedule"))):
        if recompute_settings.schedule is None:
            raise UsageError(
                f"the selection's schedule was a file, of which it knows the digest alone ({settings['schedule']})",
                hint="pass `schedule=file:PATH`, as it was when the selection was made",
            )
        settings["schedule"] = recompute_settings.schedule
    try:
        config = SelectConfig(**settings, device=recompute_settings.device, threads=0)
    except TypeError as error:
        raise UsageError(
            f"the selection has settings that this version does not know: {error}",
            hint=f"select again: {command_line('gstds-select', store.location)}",
        ) from error
    selector = BatchSelector(store, config)
    same_schedule = selector.plan.schedule.identity == header.settings.get("schedule")
    if same_schedule and guidance not in {None, selector.guidance_digest}:
        selector.change_guidance(*_guidance_of(store, guidance, recompute_settings.guidance))
    if selector.digest != header.selection_digest:
        raise FingerprintMismatchError(
            f"the same settings now give selection {selector.digest[:12]}, the file holds "
            f"{header.selection_digest[:12]}: it was made by another version, or by a rule that was changed since",
            hint=f"select again: {command_line('gstds-select', store.location)}",
        )
    return selector


def _guidance_of(store: EmbeddingStore, digest: str, given: str | None) -> tuple[str, GuidanceKey]:
    """The guidance of that digest, which is not what ``auto`` would be, and its digests.

    Raises:
        FingerprintMismatchError: It is none of those that are known here.
    """
    labels = labels_digest(store)
    for text in sorted({*catalog.GUIDANCE_KINDS} - {"auto"}) if given is None else (given,):
        key = key_of(store, parse_guidance(text), labels)
        if key.digest == digest:
            return text, key
    raise FingerprintMismatchError(
        f"the selection's guidance {digest[:12]} is "
        + ("one with parameters, or of a file" if given is None else f"not {given!r}"),
        hint="pass the `guidance` that the selection was made with",
    )


def watch_again(selector: BatchSelector, stored: Iterable[SelectedBatch]) -> Iterator[SeenBatch]:
    """Compute batches again and compare.

    Args:
        selector: From :func:`selector_of`.
        stored: Consecutive batches of the selection.

    Yields:
        Each with all its rows.

    Raises:
        FingerprintMismatchError: A batch computed again keeps other rows.
    """
    rest = iter(stored)
    first = next(rest, None)
    if first is None:
        return
    again = selector.watch(first.seq)
    try:
        for selection, (mine, seen) in zip(_chain(first, rest), again, strict=False):
            if not np.array_equal(selection.kept, mine.kept):
                both = len(np.intersect1d(selection.kept, mine.kept))
                raise FingerprintMismatchError(
                    f"batch {selection.seq} of the selection keeps other rows than the same settings do here: "
                    f"{both} of {len(mine.kept)} are the same",
                    hint="it was computed on another kind of device, or by other library versions: name that `device`, "
                    "or select again here",
                )
            indices = selector.plan.batch(selection.seq).indices
            yield SeenBatch(
                selection, indices, np.isin(indices, selection.kept), seen, has_spectrum=selector.rule.vectors > 0
            )
    finally:
        again.close()  # type: ignore[attr-defined]


def spans(batches: list[SelectedBatch], *, most: int) -> list[list[SelectedBatch]]:
    """Up to ``most`` of a run's batches: from its beginning, its middle and its end; all where they are no more."""
    if len(batches) <= most:
        return [batches]
    third = most // 3
    starts = (0, (len(batches) - third) // 2, len(batches) - third)
    return [list(islice(batches, start, start + third)) for start in starts]


def _chain(first: SelectedBatch, rest: Iterator[SelectedBatch]) -> Iterator[SelectedBatch]:
    yield first
    yield from rest
