"""Images that are objects of a bucket, one each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.ahead import ReadAhead
from gstds_cache.data.decode import UndecodableError, decode_image
from gstds_cache.data.files import MAX_BYTES, Files
from gstds_cache.data.hashed import require_same, require_unread_before
from gstds_cache.data.names import Names
from gstds_cache.data.subset import taken
from gstds_cache.errors import IntegrityError
from gstds_cache.files.bucket import Bucket, ChangedError
from gstds_cache.files.fetch import Part


@dataclass(frozen=True)
class Objects(Files):
    """Objects below one place of a bucket, in a fixed order, each with the signature that a listing gave.

    Attributes:
        signatures: [N, 4] of each: bytes; time, zero where there is an etag; zero; and a hash of the etag.
        etags: The etag of each; empty where there is none.
    """

    signatures: Int64[np.ndarray, "N 4"] = field(repr=False)
    etags: Sequence[str] = field(repr=False)

    def part(self, rows: Iterable[int]) -> Objects:
        """Some of the objects."""
        some = np.fromiter(rows, np.int64)
        names, etags = (Names.of(all_of[row] for row in some.tolist()) for all_of in (self.names, self.etags))
        return Objects(self.folder, names, taken(self.signatures, some), etags)


@dataclass(frozen=True, eq=False, kw_only=True)
class ObjectSource:
    """Images in objects, one each. An item's payload is the object's bytes."""

    uri: str
    kind: str
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    objects: Objects
    bucket: Bucket = field(repr=False)
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()
    hashed: UInt8[np.ndarray, "N 32"] | None = field(default=None, repr=False)
    reading: ReadAhead = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reading", ReadAhead(self.bucket, self._part))

    @property
    def files(self) -> Files | None:
        """None: what is in a bucket cannot be opened by a path."""
        return None

    def __repr__(self) -> str:
        return f"ObjectSource({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    def expect(self, rows: Sequence[int]) -> None:
        """Ask for what will be read next."""
        self.reading.expect(rows)

    def payload(self, row: int) -> bytes:
        """The bytes of object ``row``.

        Raises:
            OSError: The object is gone.
            IntegrityError: It is another than when it was listed, or hashed.
        """
        try:
            data = self.reading.take(row)
        except ChangedError as error:
            raise self._changed(row) from error
        if len(data) != self.objects.signatures[row, 0]:
            raise self._changed(row)
        require_same(self, row, data)
        return data

    def _changed(self, row: int) -> IntegrityError:
        return IntegrityError(
            f"object {self.objects.path(row)}: changed since it was listed, expected what was there then",
            hint="nothing committed is lost: leave a data set as it is while it is read, and run the same command "
            "again. With another image it is another data set, and needs another store",
        )

    def image(self, row: int) -> Image.Image:
        """Object ``row`` in RGB.

        Raises:
            UndecodableError: The object is gone, has more than ``MAX_BYTES``, or is not an image.
            IncompleteError: It is gone, and was there when it was hashed.
            IntegrityError: It is another than when it was listed, or hashed.
            StoreUnavailableError: The bucket does not answer.
        """
        size = int(self.objects.signatures[row, 0])
        if size > MAX_BYTES:
            raise UndecodableError(f"too large a file: {size} bytes, at most {MAX_BYTES} are decoded")
        try:
            data = self.payload(row)
        except FileNotFoundError as error:
            require_unread_before(self, row, error)
            raise UndecodableError(f"unreadable: {error.strerror}") from None
        return decode_image(data)

    def as_hashed(self, sha256: UInt8[np.ndarray, "N 32"] | None) -> ObjectSource:
        """The same objects, compared with their hashes (:func:`gstds_cache.data.hashed.as_hashed`)."""
        return replace(self, hashed=sha256)

    def _part(self, row: int) -> Part:
        return Part(self.objects.names[row], 0, int(self.objects.signatures[row, 0]), self.objects.etags[row])
