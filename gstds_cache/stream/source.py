"""Where the record batches of a selection come from: bytes of a file or pipe, or a service."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import pyarrow as pa

from gstds_cache.errors import TruncatedStreamError
from gstds_cache.stream.schema import ByteStream

AGAIN = "select again: gstds-select STORE"
PIECE = 1 << 24  # bytes


@runtime_checkable
class BatchSource(Protocol):
    """Record batches in order.

    Attributes:
        schema: Their schema; its metadata is the selection's header.
        first_seq: The batch the records begin with.
    """

    schema: pa.Schema
    first_seq: int

    def read(self) -> tuple[pa.RecordBatch, str]:
        """The next record batch, and the text of an error record in it, if any.

        Raises:
            EOFError: There is no further one; the text says why, or is empty.
        """
        ...

    def close(self) -> None:
        """Close the file, pipe or connection."""
        ...


class _InPieces:
    """What Arrow reads from. A length that is damaged is told as such, and not as memory that ran out for it."""

    def __init__(self, file: ByteStream) -> None:
        self._file = file

    @property
    def closed(self) -> bool:
        """Whether it is closed; Arrow asks."""
        return self._file.closed

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; of many a piece at a time, as a file allocates what is asked for before it looks."""
        if size <= PIECE:
            return self._file.read(size)
        pieces = []
        while size > 0 and (piece := self._file.read(min(size, PIECE))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class ByteSource:
    """Record batches of an Arrow IPC stream in a file or pipe."""

    first_seq = 0

    def __init__(self, file: ByteStream) -> None:
        """Read the schema.

        Raises:
            TruncatedStreamError: There is none.
        """
        self._file = file
        try:
            self._reader = pa.ipc.open_stream(_InPieces(file))
        except (pa.ArrowException, OSError) as error:
            raise TruncatedStreamError(
                f"this is no selection, or one that ends inside its header ({first_line(error)})", hint=AGAIN
            ) from error
        self.schema = self._reader.schema

    def read(self) -> tuple[pa.RecordBatch, str]:
        """The next record batch, checked by Arrow.

        Raises:
            EOFError: The stream ends here, or cannot be read on.
        """
        try:
            batch, extra = self._reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
        except StopIteration:
            raise EOFError("end of file") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise EOFError(first_line(error) or type(error).__name__) from error
        return batch, (extra or {}).get(b"error", b"no reason given").decode(errors="replace")

    def close(self) -> None:
        """Close the file or pipe."""
        self._file.close()


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).partition("\n")[0]
