"""Names that differ between the versions of the format on disk. All else, and every array, is the same in each.

New stores are written in :data:`CURRENT`. A store of format 1 is read, resumed and repaired in format 1, so that its
fingerprint, and with it every selection made from it, stays what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """The names of one version.

    Attributes:
        version: The number in the specification.
        shard_rows: Field of the specification: rows per shard.
        shard: Field of a commit record: the shard's number.
        shards: Field of COMPLETE (how many) and of a repair's note (which).
        commits_sha256: Field of COMPLETE: Merkle root over the commit records.
        commits: Folder of the commit records.
    """

    version: int
    shard_rows: str = "shard_rows"
    shard: str = "shard"
    shards: str = "shards"
    commits_sha256: str = "commits_sha256"
    commits: str = "commits"

    def commit_key(self, shard: int) -> str:
        """Key of a shard's commit record."""
        return f"{self.commits}/{shard}.json"

    def to_disk(self, fields: dict[str, Any]) -> dict[str, Any]:
        """``fields`` of a specification or record, by the names they have on disk."""
        return {getattr(self, name) if name in _RENAMED else name: value for name, value in fields.items()}

    def from_disk(self, fields: dict[str, Any]) -> dict[str, Any]:
        """``fields`` read from disk, by the names they have in this package."""
        names = {getattr(self, name): name for name in _RENAMED}
        return {names.get(name, name): value for name, value in fields.items()}


_RENAMED = ("shard_rows", "shard", "shards", "commits_sha256")

CURRENT = Format(2)
FORMATS = {
    2: CURRENT,
    1: Format(1, "unit_rows", "unit", "units", "receipts_sha256", "receipts"),
}
