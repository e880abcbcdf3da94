"""What a consumer may ask of a service: a small JSON object, every field of which is checked. It can name no path.

``{"select": {settings}}`` or ``{"digest": "0123abcd..."}`` or neither (the selection the service was started with); and
``"start": {resume token}``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gstds_cache.errors import UsageError
from gstds_cache.selection import catalog
from gstds_cache.stream.resume import ResumeToken

LIMIT = 4096  # bytes
DIGEST = re.compile(r"[0-9a-f]{8,64}")
SCHEDULE = re.compile(r"[a-z]{1,16}(:[0-9eE.+-]{1,24}){1,8}")  # numbers alone: file:PATH would name a path
ORDER = re.compile(rf"permutation|class-balanced|window|{SCHEDULE.pattern}")
GUIDANCE = re.compile("|".join(catalog.GUIDANCE_KINDS))
RULE = re.compile(r"[a-z0-9_-]{1,64}")  # a name alone: module:function would run what the service's user did not choose
# "partitions" is what batch_assignments were called by earlier versions.
NUMBERS = {"batch_size": 1 << 20, "epochs": 10_000, "knn": 1 << 16, "seed": 1 << 62, "max_iterations": 100_000,
           "min_per_class": 1 << 20, "strata": 1 << 12, "batch_assignments": 10_000, "partitions": 10_000}  # fmt: skip


@dataclass(frozen=True)
class Ticket:
    """A parsed ticket.

    Attributes:
        select: Settings of the selection that differ from the defaults; None where a digest, or nothing, names it.
        digest: First digits of the selection's digest.
        start: Where to begin; None at the beginning.
    """

    select: dict[str, Any] | None = None
    digest: str | None = None
    start: ResumeToken | None = None

    def to_bytes(self) -> bytes:
        """As it goes over the network."""
        fields = {"select": self.select, "digest": self.digest, "start": self.start and self.start.as_dict()}
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()

    @classmethod
    def parse(cls, data: bytes) -> Ticket:
        """Parse and check a ticket.

        Raises:
            UsageError: It is too large, no JSON object, has an unknown field, or a field is not what it should be.
        """
        if len(data) > LIMIT:
            raise UsageError(f"ticket of {len(data)} bytes, expected at most {LIMIT}")
        try:
            fields = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise UsageError("the ticket is no JSON") from error
        if not isinstance(fields, dict):
            raise UsageError(f"the ticket is a JSON {type(fields).__name__}, expected an object")
        _known("ticket", fields, ("digest", "select", "start"))
        if "digest" in fields and "select" in fields:
            raise UsageError("the ticket names a selection twice, by digest and by settings")
        digest, start = fields.get("digest"), fields.get("start")
        if "digest" in fields and (not isinstance(digest, str) or not DIGEST.fullmatch(digest)):
            raise UsageError(f"ticket, digest: got {digest!r:.80}, expected 8 to 64 hexadecimal digits")
        select = _settings(fields["select"]) if "select" in fields else None
        return cls(select, digest, ResumeToken.parse(start) if "start" in fields else None)


def _settings(fields: object) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise UsageError(f"ticket, select: got a JSON {type(fields).__name__}, expected an object")
    _known(
        "ticket, select",
        fields,
        (*NUMBERS, "schedule", "rule", "draw", "reference", "laplacian", "tolerance", "order", "guidance"),
    )
    for name, value in fields.items():
        if name in NUMBERS:
            good = type(value) is int and 0 <= value <= NUMBERS[name]
        elif name == "tolerance":
            good = type(value) is float and 0 < value < 1
        else:
            patterns = {"schedule": SCHEDULE, "order": ORDER, "guidance": GUIDANCE}
            pattern = patterns.get(name, RULE)
            good = isinstance(value, str) and pattern.fullmatch(value) is not None
        if not good:
            raise UsageError(f"ticket, select, {name}: {value!r:.80} may not be asked for over the network")
    return fields


def _known(what: str, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise UsageError(f"{what}: unknown field {unknown[0]!r:.80}, there are: {', '.join(sorted(names))}")
