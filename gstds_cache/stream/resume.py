"""Where in a selection a consumer stands, as a few numbers that survive the process."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from gstds_cache.errors import UsageError

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ResumeToken:
    """A position in a selection: after the data record before ``next_seq``.

    Attributes:
        selection_digest: Identity of the selection.
        cache_fingerprint: Fingerprint of the store it was made from.
        epoch: Epoch of the next batch.
        next_seq: The batch that comes next.
        kept: Rows kept in the batches before it.
        sha256: Running hash over the records up to here, 64 hexadecimal digits.
    """

    selection_digest: str
    cache_fingerprint: str
    epoch: int
    next_seq: int
    kept: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def parse(cls, fields: object) -> ResumeToken:
        """A token from what :meth:`as_dict` gave.

        Raises:
            UsageError: A field is missing, unknown, or not what it should be.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(fields, dict) or set(fields) != names:
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise UsageError(f"this is no resume token: got {got}, expected the fields {', '.join(sorted(names))}")
        for name in ("selection_digest", "cache_fingerprint", "sha256"):
            if not isinstance(fields[name], str) or not SHA256.fullmatch(fields[name]):
                raise UsageError(f"resume token, {name}: got {fields[name]!r:.80}, expected 64 hexadecimal digits")
        for name in ("epoch", "next_seq", "kept"):
            if type(fields[name]) is not int or not 0 <= fields[name] < 1 << 62:
                raise UsageError(f"resume token, {name}: got {fields[name]!r:.80}, expected a number from 0 on")
        return cls(**fields)
