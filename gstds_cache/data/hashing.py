"""Hashing a data set's items in other processes and on other machines."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import numpy as np
from jaxtyping import Int64, UInt8

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.files import Files
from gstds_cache.data.objects import Objects
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DatasetError, GstdsError
from gstds_cache.runtime.executor import Executor, PickledTask
from gstds_cache.runtime.resources import about_us

UNREADABLE = bytes(32)
"""The SHA-256 recorded for an item whose bytes could not be read."""
SPREAD_FROM = 2000
"""Items from which on other processes are asked: below, starting to is what takes time."""
REACHABLE = "every machine has to see the data set under the same name: a path on a shared file system, or s3://"

Hashed = tuple[Int64[np.ndarray, " n"], UInt8[np.ndarray, "n 32"], str]


def hash_item(source: ImageSource, files: Files | None, row: int) -> bytes:
    """SHA-256 of an item's payload; ``UNREADABLE`` where reading raises OSError.

    Args:
        source: The data set.
        files: Its files, if it is made of files.
        row: The item.

    Returns:
        32 bytes.

    Raises:
        OSError: This process ran out of something.
    """
    try:
        # A file can be larger than memory.
        by_path = files is not None and not isinstance(files, Objects)
        return files.sha256(row) if files and by_path else hashlib.sha256(source.payload(row)).digest()
    except OSError as error:
        if about_us(error) or isinstance(error, GstdsError):
            raise
        return UNREADABLE


@dataclass(frozen=True)
class HashAnywhere(PickledTask):
    """Hashes rows of a data set.

    Attributes:
        source: The data set.
        key: What tells this one from others.
    """

    source: ImageSource
    key: str = field(default_factory=lambda: uuid4().hex)
    counted = "blocks of items to hash"

    def __call__(self, units: Sequence[Int64[np.ndarray, " n"]]) -> Iterator[Hashed]:
        """Hash.

        Args:
            units: Rows.

        Yields:
            The rows of each unit, their digests, and on which machine they were read.
        """
        source, files = self.source, getattr(self.source, "objects", self.source.files)
        for rows in units:
            expect_rows(source, rows.tolist())
            digests = b"".join(hash_item(source, files, row) for row in rows.tolist())
            yield rows, np.frombuffer(digests, np.uint8).reshape(-1, 32), platform.node()


def hash_by(
    executor: Executor, source: ImageSource, files: Files | None, units: Iterable[Int64[np.ndarray, " n"]]
) -> Iterator[Hashed]:
    """Hash rows of a data set where an executor has it done.

    Args:
        executor: Where.
        source: The data set.
        files: Its files, if it is made of files.
        units: Blocks of rows.

    Yields:
        The rows of each, as they are done, their digests, and on which machine they were read.

    Raises:
        DatasetError: A machine cannot read what this one can.
    """
    for rows, digests, machine in executor.run(HashAnywhere(source), units):
        unread = rows[(digests == 0).all(axis=1)]
        for row in unread.tolist():
            if hash_item(source, files, row) != UNREADABLE:
                raise DatasetError(f"{source.uri}: item {source.ids[row]} cannot be read on {machine}", hint=REACHABLE)
        yield rows, digests, machine
