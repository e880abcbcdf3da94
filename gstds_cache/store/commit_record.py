"""Commit records, one per shard: a shard is committed exactly when its commit record exists."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from gstds_cache.errors import IntegrityError
from gstds_cache.files.digest import canonical_json, digest_of, merkle_root
from gstds_cache.store.format import Format


@dataclass(frozen=True)
class Quarantined:
    """An item without an embedding: it could not be decoded, or the model gives no features for it.

    Its row is zero and ``valid`` is 2.

    Attributes:
        row: Row of the store, which is the item's position in the manifest.
        id: The item's id.
        reason: Why; where it does not decode, in the decoder's words.
    """

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class CommitRecord:
    """What was committed for one shard. No time and no count of tries: the same rows give the same record.

    Attributes:
        shard: The shard.
        rows: First row, and one past the last.
        object_sha256: Hash of the stored object, read back after writing.
        content_sha256: Hash of the rows' little-endian bytes.
        size: Bytes of the stored object.
        fingerprint: The store's.
        quarantined: Items of the shard that have no embedding, in row order.
    """

    shard: int
    rows: tuple[int, int]
    object_sha256: str
    content_sha256: str
    size: int
    fingerprint: str
    quarantined: tuple[Quarantined, ...] = ()

    def to_bytes(self, names: Format) -> bytes:
        """Canonical JSON of the fields and ``sha256``, the hash of that of the fields; and a line end."""
        fields = names.to_disk(asdict(self))
        return canonical_json(fields | {"sha256": digest_of(fields)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, names: Format, *, shard: int, fingerprint: str) -> CommitRecord:
        """Parse a commit record and check that it is this shard's, of this store.

        Args:
            data: Its bytes.
            names: The store's format.
            shard: The shard it should be of.
            fingerprint: The store's.

        Returns:
            The record.

        Raises:
            IntegrityError: It is damaged, or of another shard or store.
        """
        try:
            fields = json.loads(data)
            told = fields.pop("sha256")
            found = digest_of(fields)
            fields["rows"] = tuple(fields["rows"])
            fields["quarantined"] = tuple(Quarantined(**item) for item in fields["quarantined"])
            commit = cls(**names.from_disk(fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(
                f"commit record of shard {shard} is damaged: {type(error).__name__}",
                hint=f"delete {names.commit_key(shard)} and embed again: only that shard is done again",
            ) from error
        if told != found:
            raise IntegrityError(
                f"commit record of shard {shard} is damaged: its own hash is {found[:12]}, it says {str(told)[:12]}"
            )
        if (commit.shard, commit.fingerprint) != (shard, fingerprint):
            raise IntegrityError(
                f"commit record of shard {shard} belongs to shard {commit.shard} of store {commit.fingerprint[:12]}, "
                f"expected store {fingerprint[:12]}"
            )
        return commit


def commits_root(commits: dict[int, CommitRecord], names: Format) -> str:
    """Merkle root over the commit records in shard order, as they are on disk."""
    return merkle_root(commits[shard].to_bytes(names) for shard in sorted(commits))
