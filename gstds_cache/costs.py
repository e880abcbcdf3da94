"""What it cost to make a store or a selection, in a small file beside it. Provenance: nothing depends on it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from gstds_cache.places import beside


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
    """

    of: str
    samples: int
    reused: int
    seconds: float
    joules: float | None
    device: str
    store: str | None = None


def store_costs(where: str | Path) -> Path:
    """Where the cost of the store at ``where`` is written down."""
    return beside(where, ".cost.json")


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


def record(path: Path, cost: Cost) -> None:
    """Add a session's cost to what ``path`` says of the same thing; what it says of another is replaced."""
    before = recall(path, cost.of)
    if before is not None:
        known = before.joules is not None and cost.joules is not None
        fields = asdict(cost) | {
            "samples": before.samples + cost.samples,
            "reused": before.reused + cost.reused,
            "seconds": before.seconds + cost.seconds,
            "joules": (before.joules or 0) + (cost.joules or 0) if known else None,
        }
        cost = Cost(**fields)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(asdict(cost), sort_keys=True) + "\n")
    temporary.replace(path)
