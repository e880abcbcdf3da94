"""What it cost to make a store or a selection, in a small file beside it. Provenance: nothing depends on it.

Where nothing can be written beside a store, it is in the cache (:mod:`gstds_cache.files.derived`), or nowhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gstds_cache.errors import IncompleteError
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import COST, derived_paths, keep
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.files.lock import exclusive

TURN = 5.0
"""Seconds to wait until other processes have written down theirs."""


@dataclass(frozen=True)
class Cost:
    """What making something cost, over all sessions that came to their end.

    Attributes:
        of: Digest of what was made.
        samples: Samples computed: embedded, or looked at by selection.
        reused: Samples taken over from elsewhere.
        seconds: Wall-clock seconds.
        joules: Joules, None where any session had no counter.
        device: Where it was computed last.
        store: The store a selection was made from.
        joules_from: What is counted in ``joules``, and what was in use and is not, in words.
    """

    of: str
    samples: int
    reused: int
    seconds: float
    joules: float | None
    device: str
    store: str | None = None
    joules_from: str = ""


def store_costs(where: LocationLike) -> list[Path]:
    """Where the cost of the store at ``where`` may be written down, in the order to look."""
    return derived_paths(Location.parse(where), COST)


def selection_costs(file: Path) -> Path:
    """Where the cost of a selection file is written down."""
    return file.with_name(f".{file.name}.cost.json")


def recall(path: Path, of: str | None = None) -> Cost | None:
    """The cost in ``path``, or None where there is none, or one of something else than ``of``."""
    try:
        cost = Cost(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return cost if of in {None, cost.of} else None


def recall_store(where: LocationLike, of: str | None = None) -> Cost | None:
    """The cost of the store at ``where``, or None where none of this fingerprint is written down."""
    found = (recall(path, of) for path in store_costs(where))
    return next((cost for cost in found if cost is not None), None)


def record(path: Path, cost: Cost, *, anew: bool = False) -> None:
    """Add a session's cost to what ``path`` says of the same thing; what it says of another is replaced.

    Args:
        path: The file; its folder is there.
        cost: What the session cost.
        anew: Whether the file, which something else of the same digest left, counts for nothing.

    Raises:
        OSError: The file cannot be written.
    """
    before = None if anew else recall(path, cost.of)
    if before is not None:
        known = before.joules is not None and cost.joules is not None
        fields = asdict(cost) | {
            "samples": before.samples + cost.samples,
            "reused": before.reused + cost.reused,
            "seconds": before.seconds + cost.seconds,
            "joules": (before.joules or 0) + (cost.joules or 0) if known else None,
        }
        cost = Cost(**fields)
    with atomic_write(path, durable=False) as file:
        file.write(json.dumps(asdict(cost), sort_keys=True).encode() + b"\n")


def record_in_turn(path: Path, cost: Cost) -> None:
    """:func:`record`, where other processes may add theirs at the same moment: one after the other.

    Args:
        path: The file; its folder is there.
        cost: What the session cost.

    Raises:
        OSError: The file cannot be written.
        IncompleteError: It was not this process's turn for :data:`TURN` seconds.
    """
    lock, tries = path.with_name(f".{path.name}.lock"), 50
    for left in reversed(range(tries)):
        try:
            with exclusive(lock, of=path):
                record(path, cost)
                lock.unlink(missing_ok=True)
            return
        except IncompleteError:
            if not left:
                raise
        time.sleep(TURN / tries)


def keep_record(paths: Sequence[Path], cost: Cost, *, anew: bool = False, in_turn: bool = False) -> str:
    """:func:`record` at the first of ``paths`` that can be written.

    Args:
        paths: Where the cost may be written down, the best place first.
        cost: What the session cost.
        anew: As for :func:`record`.
        in_turn: Whether other processes add theirs to the same file, and none may be lost.

    Returns:
        Why it is written down nowhere, for the user; empty where it is.
    """
    try:
        place = keep(lambda path: record_in_turn(path, cost) if in_turn else record(path, cost, anew=anew), paths)
    except IncompleteError as error:
        return f"what it cost is not kept: {error.message}"
    return "" if place.path else f"what it cost is not kept: {place.note}"
