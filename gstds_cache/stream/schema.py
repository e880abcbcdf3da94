"""One record schema for file, pipe and network: the Arrow IPC stream format, a row per record (docs/stream-format.md).

A stream is a schema with metadata (:class:`Header`), data records, an epoch-end record after each epoch, and one
stream-end record. Arrow's own end-of-stream marker and a plain end of file both appear after a killed producer, so only
the stream-end record means that a selection is whole.

========  =================  ====================================================================================
kind      ``seq``            ``kept``
========  =================  ====================================================================================
0 data    the batch's        rows of the store that stay
1 epoch   the next batch's   [rows kept in the epoch]
2 end     number of batches  [batches, rows kept, and the running SHA-256 as four big-endian signed 64-bit words]
3 error   the next batch's   [] (the message is in the record's custom metadata, key ``error``)
========  =================  ====================================================================================

A selection of candidates (format 3) has other columns: ``rows`` are all rows of a batch, and ``keep`` says how many of
them a trainer draws, by their ``stratum``, ``reference`` loss and ``prior``. Its marks have their numbers in ``rows``.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from gstds_cache.errors import StreamError

FORMAT = 2
CANDIDATES_FORMAT = 3
ByteStream = BinaryIO | io.IOBase  # a binary file, a pipe, or io.BytesIO


FIELDS = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("batch_id", pa.int64(), nullable=False),
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("n_in", pa.int32(), nullable=False),
        pa.field("kept", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
        pa.field("score", pa.list_(pa.field("item", pa.float32(), nullable=False))),
        pa.field("status", pa.int8(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("residual", pa.float32(), nullable=False),
        pa.field("crc", pa.uint32(), nullable=False),
    ]
)
CANDIDATE_FIELDS = pa.schema(
    [
        *(FIELDS.field(name) for name in ("seq", "epoch", "batch_id", "kind", "n_in")),
        pa.field("keep", pa.int32(), nullable=False),
        pa.field("rows", FIELDS.field("kept").type, nullable=False),
        pa.field("stratum", pa.list_(pa.field("item", pa.int16(), nullable=False)), nullable=False),
        pa.field("reference", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
        pa.field("prior", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
        *(FIELDS.field(name) for name in ("status", "value", "residual", "crc")),
    ]
)
_COLUMNS = {FORMAT: FIELDS, CANDIDATES_FORMAT: CANDIDATE_FIELDS}


@dataclass(frozen=True)
class Header:
    """What a stream says of itself before its first record.

    Attributes:
        cache_fingerprint: Fingerprint of the store the rows are of.
        selection_digest: Identity of the selection.
        items: Items of the data set (N); rows are 0..N-1.
        items_root: Merkle root of the data set's manifest.
        seed: Seed of the selection.
        epochs: Epochs.
        batches_per_epoch: Batches of each epoch.
        total_batches: Data records of the whole stream.
        total_kept: Rows kept in the whole stream; of candidates, those to be drawn.
        kept_per_epoch: The same of each epoch.
        settings: Every setting of the selection.
        format: Version of the schema: 2 for kept rows, 3 for candidates.
    """

    cache_fingerprint: str
    selection_digest: str
    items: int
    items_root: str
    seed: int
    epochs: int
    batches_per_epoch: int
    total_batches: int
    total_kept: int
    kept_per_epoch: list[int]
    settings: dict[str, Any]
    format: int = FORMAT

    @property
    def candidates(self) -> bool:
        """Whether the stream offers candidates, of which a trainer draws, and not rows that stay."""
        return self.format == CANDIDATES_FORMAT

    def to_schema(self) -> pa.Schema:
        """The Arrow schema with this header as metadata."""
        metadata = {f"gstds.{key}": json.dumps(value) for key, value in asdict(self).items()}
        return _COLUMNS.get(self.format, FIELDS).with_metadata(metadata)

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> Header:
        """Parse a schema's metadata.

        Raises:
            StreamError: The columns or the version are not ours.
        """
        pairs = (schema.metadata or {}).items()
        try:
            fields = {k.decode()[6:]: json.loads(v) for k, v in pairs if k.startswith(b"gstds.")}
        except ValueError as error:
            raise StreamError(f"the selection's header is damaged: {error}") from error
        if "format" not in fields:
            raise StreamError("this Arrow stream is no selection: its schema has no gstds metadata")
        form = fields["format"]
        if form not in list(_COLUMNS):  # a damaged one may be anything
            raise StreamError(
                f"selection format {form} is not supported, expected {FORMAT} or {CANDIDATES_FORMAT}",
                hint="select again with this version: gstds-select STORE",
            )
        if not schema.remove_metadata().equals(_COLUMNS[form]):
            raise StreamError(f"the selection's columns are not format {form}'s: got {schema.names}")
        if not isinstance(fields.get("kept_per_epoch"), list):
            raise StreamError("the selection's header is damaged: kept_per_epoch is no list")
        try:
            header = cls(**fields)
        except TypeError as error:
            raise StreamError(f"the selection's header is damaged: {error}") from error
        numbers = (header.epochs, header.batches_per_epoch, header.total_batches, header.total_kept, header.items)
        kept = header.kept_per_epoch
        if not all(isinstance(number, int) for number in (*numbers, *kept)):
            raise StreamError(f"the selection's header is damaged: got {numbers} and {kept}, expected whole numbers")
        if header.epochs * header.batches_per_epoch != header.total_batches:
            raise StreamError(
                f"the selection's header is damaged: {header.epochs} epochs of {header.batches_per_epoch} batches are "
                f"not {header.total_batches}"
            )
        if (len(kept), sum(kept)) != (header.epochs, header.total_kept):
            raise StreamError(
                f"the selection's header is damaged: it says what {len(kept)} epochs keep, {sum(kept)} rows in all; "
                f"expected {header.epochs} epochs and {header.total_kept} rows"
            )
        return header
