"""Commit records, one per shard: a shard is committed exactly when its commit record exists."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np

from gstds_cache.errors import IntegrityError
from gstds_cache.files import mapped
from gstds_cache.files.digest import canonical_json, digest_of, merkle_root
from gstds_cache.store import layout
from gstds_cache.store.format import Format
from gstds_cache.store.spec import CacheSpec


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


@dataclass(frozen=True, slots=True)  # a process that finishes a store holds one for each shard
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
        return replace(commit, fingerprint=fingerprint)  # one text for all records


def commits_root(commits: dict[int, CommitRecord], names: Format) -> str:
    """Merkle root over the commit records in shard order, as they are on disk."""
    return merkle_root(commits[shard].to_bytes(names) for shard in sorted(commits))


def valid_of(spec: CacheSpec, commits: dict[int, CommitRecord]) -> np.ndarray:
    """The ``valid`` array [N] uint8 that the commit records amount to."""
    valid = mapped.zeros((spec.items,), np.uint8)
    for shard in range(spec.shards):
        span = spec.rows_of(shard)
        valid[span.start : span.stop] = valid_in(spec, commits, shard)
    return valid


def counts_of(spec: CacheSpec, commits: dict[int, CommitRecord]) -> tuple[int, int]:
    """How many rows have an embedding, and how many could not be decoded."""
    quarantined = sum(len({item.row for item in commit.quarantined}) for commit in commits.values())
    return sum(len(spec.rows_of(shard)) for shard in commits) - quarantined, quarantined


def valid_in(spec: CacheSpec, commits: dict[int, CommitRecord], shard: int) -> np.ndarray:
    """A shard's part [R] of the ``valid`` array."""
    span = spec.rows_of(shard)
    valid = np.full(len(span), layout.OK if shard in commits else layout.MISSING, np.uint8)
    for item in commits[shard].quarantined if shard in commits else ():
        valid[item.row - span.start] = layout.UNDECODABLE
    return valid


def without_embedding(spec: CacheSpec, commits: dict[int, CommitRecord]) -> np.ndarray:
    """The rows [A] int64, ascending, whose ``valid`` is not 1."""
    parts = [
        np.unique([item.row for item in commits[shard].quarantined])
        if shard in commits
        else np.arange(spec.rows_of(shard).start, spec.rows_of(shard).stop)
        for shard in range(spec.shards)
        if shard not in commits or commits[shard].quarantined
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])
