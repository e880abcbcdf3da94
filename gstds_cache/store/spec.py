"""What a store holds, spelled out field by field; its SHA-256 is the store's fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from gstds_cache.errors import FingerprintMismatchError, IntegrityError
from gstds_cache.files.digest import digest_of
from gstds_cache.files.location import Location
from gstds_cache.store.format import CURRENT, FORMATS, Format

IMPORTED = "imported"
"""The model of rows that another tool computed, with ``:NAME`` where the user said what made them."""


@dataclass(frozen=True)
class CacheSpec:
    """Every field that decides what bytes a store holds. Never a path, a time or a library version.

    Attributes:
        items: Number of items (N).
        items_root: Merkle root over the ordered item ids, hashes of bytes and labels.
        encoder: :class:`EncoderSpec` as a dictionary.
        dim: Length of an embedding (D).
        dtype: How an embedding is stored.
        batch_size: Images per forward pass; float32 results differ with it.
        shard_rows: Rows per shard, a multiple of ``batch_size``.
        format: Version of the layout.
    """

    items: int
    items_root: str
    encoder: dict[str, Any]
    dim: int
    dtype: Literal["float16", "float32"]
    batch_size: int
    shard_rows: int
    format: int = CURRENT.version

    def __post_init__(self) -> None:
        if self.items < 1 or self.dim < 1 or self.batch_size < 1 or self.shard_rows % self.batch_size:
            raise ValueError(
                f"items, dim and batch_size must be >= 1 and shard_rows a multiple of batch_size, got {self.items}, "
                f"{self.dim}, {self.batch_size}, {self.shard_rows}"
            )

    @property
    def names(self) -> Format:
        """The names that the store's files use."""
        return FORMATS[self.format]

    @property
    def imported(self) -> bool:
        """Whether another tool computed the rows: no model and no image are known that could make them again."""
        return str(self.encoder.get("model", "")).partition(":")[0] == IMPORTED

    @cached_property  # one text for all commit records that are held
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of all fields."""
        return digest_of(self.to_dict())

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.items // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Rows of one shard; the last may be shorter."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.items))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values, by the names of the store's format."""
        return self.names.to_disk(asdict(self))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CacheSpec:
        """Parse what :meth:`to_dict` gave.

        Raises:
            IntegrityError: The format is another, or fields are missing or unknown.
        """
        names = next((names for number, names in FORMATS.items() if number == fields.get("format")), None)
        if names is None:
            raise IntegrityError(
                f"cache format {fields.get('format')!r} is not supported, expected one of {sorted(FORMATS)}",
                hint="the store was written by another version of gstds-cache: embed again into a new one",
            )
        try:
            return cls(**names.from_disk(fields))
        except (TypeError, ValueError) as error:
            raise IntegrityError(f"the store's specification is damaged: {error}") from error


def differences(stored: CacheSpec, wanted: CacheSpec) -> list[str]:
    """Fields in which two specifications differ, one line each: name, stored value, wanted value.

    The version of the format is none of them: a store is taken as it is.
    """
    ours, theirs = dict(_flatten(asdict(stored))), dict(_flatten(asdict(replace(wanted, format=stored.format))))
    return [
        f"{name}: the store has {ours.get(name)!r}, this run has {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def require_same(stored: CacheSpec, wanted: CacheSpec, *, where: Location, otherwise: str = "") -> None:
    """Refuse a store made from something else, naming the fields that differ.

    Args:
        stored: What the store holds.
        wanted: What the caller has.
        where: The store.
        otherwise: What to do where it is neither code nor sizes that differ; by default for a caller that embeds.

    Raises:
        FingerprintMismatchError: If any field differs.
    """
    lines = differences(stored, wanted)
    if lines:
        sizes = ("batch_size", "shard_rows")
        given = [f"`{name}`" for name in sizes if any(line.startswith(f"{name}:") for line in lines)]
        hint = f"leave out {' and '.join(given)} to take the store's own" if len(given) == len(lines) else ""
        raise FingerprintMismatchError(
            f"{where} holds other embeddings (fingerprint {stored.fingerprint[:12]}, this run {wanted.fingerprint[:12]}"
            "):\n    " + "\n    ".join(lines),
            hint=code_changed(stored.encoder["model"], lines)
            or f"nothing was changed; {hint or otherwise or 'give another `cache`, or none'}",
        )


def code_changed(model: str, lines: list[str]) -> str:
    """What to do where ``lines`` say that nothing differs but the code of a model of a user's own; '' otherwise."""
    if len(lines) != 1 or not lines[0].startswith("encoder.source:"):
        return ""
    return (
        f"nothing was changed; the file of {model} is another than when the store was made: put it back as it was, or "
        "embed into a new store"
    )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
