"""Canonical JSON and SHA-256 digests: the identity of everything that is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from gstds_cache.files import mapped


def canonical_json(value: Any) -> bytes:
    """Serialise ``value`` to the one JSON text it has: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: ``value`` holds NaN or an infinity, for which JSON has no text.
        TypeError: ``value`` holds something JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in mapped.pieces(data):
        digest.update(piece)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return sha256_hex(canonical_json(value))


def sealed(facts: dict[str, Any]) -> bytes:
    """Canonical JSON of ``facts`` and of ``sha256``, the hash of that of the facts: what :func:`unsealed` reads."""
    return canonical_json(facts | {"sha256": digest_of(facts)})


def unsealed(text: bytes) -> dict[str, Any]:
    """The facts of a record that :func:`sealed` wrote.

    Raises:
        ValueError: It is none, has no hash, or is another than the one that was written.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.pop("sha256", None) != digest_of(facts):
        raise ValueError("no record with a hash, or damaged")
    return facts


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merkle_root(leaves: Iterable[bytes]) -> str:
    """Root of the binary SHA-256 Merkle tree over ``leaves``, as 64 hexadecimal digits.

    Leaves and inner nodes are hashed with different prefixes (RFC 6962), an odd node is carried up unchanged, and the
    tree of no leaves is the hash of nothing. Memory is that of 4,096 leaves, whose subtree is one node of the tree.
    """
    leaves = iter(leaves)
    tops = []
    while block := [hashlib.sha256(b"\x00" + leaf).digest() for leaf in islice(leaves, 4096)]:
        tops.append(_top(block))
    return _top(tops).hex() if tops else sha256_hex(b"")


def _top(level: list[bytes]) -> bytes:
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]
