"""Data sets of a user's own that keep something open: each reads item i of the same 300, in a way of its own.

``write(folder)`` makes the files; a factory is called in that folder.
"""

from __future__ import annotations

import gc
import gzip
import io
import mmap
import os
import signal
import sqlite3
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, ClassVar

import numpy as np

ITEMS, SIDE = 300, 64
SIZE = SIDE * SIDE * 3
HOME = os.getpid()


def pixels(row: int) -> np.ndarray:
    """Item ``row``: two colours that no other item has, so that half an item is seen as well."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[: SIDE // 2] = (row % 256, row // 256, 1)
    image[SIDE // 2 :] = (row % 256, row // 256, 2)
    return image


def write(folder: Path) -> None:
    """Write the items as a raw file, compressed, as a zip and as a database."""
    whole = b"".join(pixels(row).tobytes() for row in range(ITEMS))
    (folder / "items.bin").write_bytes(whole)
    with gzip.open(folder / "items.gz", "wb", compresslevel=1) as file:
        file.write(whole)
    with zipfile.ZipFile(folder / "items.zip", "w") as archive:
        for row in range(ITEMS):
            archive.writestr(str(row), pixels(row).tobytes())
    with sqlite3.connect(folder / "items.db") as database:
        database.execute("create table items (id integer primary key, pixels blob)")
        database.executemany("insert into items values (?, ?)", ((row, pixels(row).tobytes()) for row in range(ITEMS)))
    database.close()


class Items:
    """What the data sets have in common."""

    def __init__(self) -> None:
        self.targets = [row % 4 for row in range(ITEMS)]

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.frombuffer(self.read(row), np.uint8).reshape(SIDE, SIDE, 3), row % 4

    def read(self, row: int) -> bytes:
        raise NotImplementedError


class RawFile(Items):
    mode = "rb"

    def __init__(self) -> None:
        super().__init__()
        self.file = open("items.bin", self.mode)  # noqa: SIM115, PTH123

    def read(self, row: int) -> bytes:
        self.file.seek(row * SIZE)
        return self.file.read(SIZE)


class ReadAndWrite(RawFile):
    mode = "r+b"


class Unbuffered(Items):
    """A number, which pickles, of a descriptor, whose position is one for all that have it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = os.open("items.bin", os.O_RDONLY)

    def read(self, row: int) -> bytes:
        os.lseek(self.number, row * SIZE, os.SEEK_SET)
        half = os.read(self.number, SIZE // 2)
        return half + os.read(self.number, SIZE - len(half))


class Zip(Items):
    def __init__(self) -> None:
        super().__init__()
        self.archive = zipfile.ZipFile("items.zip")

    def read(self, row: int) -> bytes:
        return self.archive.read(str(row))


class Database(Items):
    def __init__(self) -> None:
        super().__init__()
        self.database = sqlite3.connect("items.db", check_same_thread=False)

    def read(self, row: int) -> bytes:
        return self.database.execute("select pixels from items where id = ?", (row,)).fetchone()[0]


class Mapped(Items):
    def __init__(self) -> None:
        super().__init__()
        with open("items.bin", "rb") as file:  # noqa: PTH123
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, row: int) -> bytes:
        self.map.seek(row * SIZE)
        return self.map.read(SIZE)


class OfTheClass(Items):
    """The file is nowhere in the object: a copy of it has the same."""

    file: io.BufferedReader

    def read(self, row: int) -> bytes:
        self.file.seek(row * SIZE)
        return self.file.read(SIZE)


class OfTheModule(Items):
    def read(self, row: int) -> bytes:
        OPEN[0].seek(row * SIZE)
        return OPEN[0].read(SIZE)


OPEN: list[io.BufferedReader] = []


class Threads(RawFile):
    """Reads in threads of its own, which a fork leaves behind, under a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(2)

    def read(self, row: int) -> bytes:
        with self.lock:
            return self.pool.submit(super().read, row).result()


class Locked(OfTheClass):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.again, self.here = threading.Lock(), threading.RLock(), threading.local()

    def read(self, row: int) -> bytes:
        with self.lock, self.again:
            return super().read(row)


class Sequence(Items):
    """A stream that only goes on: what was passed is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []
        self.rest = self.stream()

    def stream(self):
        with gzip.open("items.gz", "rb") as file:
            while item := file.read(SIZE):
                yield item

    def read(self, row: int) -> bytes:
        while len(self.seen) <= row:
            self.seen.append(next(self.rest))
        return self.seen[row]


def forget() -> None:
    """Let go of what is open, while a test still says that it is meant to be."""
    OPEN.clear()
    if "file" in vars(OfTheClass):
        del OfTheClass.file
    gc.collect()


def of_the_class() -> Items:
    OfTheClass.file = open("items.bin", "rb")  # noqa: SIM115, PTH123
    return OfTheClass()


def locked() -> Items:
    of_the_class()
    return Locked()


def of_the_module() -> Items:
    OPEN[:] = [open("items.bin", "rb")]  # noqa: SIM115, PTH123
    return OfTheModule()


def local() -> Items:
    class Local(RawFile):
        pass

    return Local()


def with_function() -> Items:
    items, file = Items(), open("items.bin", "rb")  # noqa: SIM115, PTH123

    def read(row: int) -> bytes:
        file.seek(row * SIZE)
        return file.read(SIZE)

    items.read = read
    return items


def once() -> Items:
    """A data set that can be made one time only."""
    Path("made").touch(exist_ok=False)
    return local()


def changing() -> Items:
    """Items that depend on the process that reads them, in a way that nothing here can know of."""

    class Changing(RawFile):
        def read(self, row: int) -> bytes:
            return super().read(row if os.getpid() == HOME else (row + 7) % ITEMS)

    return Changing()


def failing() -> Items:
    """Items that only the first process can read."""

    class Failing(RawFile):
        def read(self, row: int) -> bytes:
            if os.getpid() != HOME and row == 40:
                raise OSError(5, "Input/output error")
            return super().read(row)

    return Failing()


def deadly() -> Items:
    """A data set that kills whoever reads an item of it, but for the first process, while there is a file "deadly"."""

    class Deadly(RawFile):
        def read(self, row: int) -> bytes:
            if row == 200 and os.getpid() != HOME and Path("deadly").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(row)

    return Deadly()


class Temporary(Items):
    """Files that were made without a name, which a module holds."""

    held: ClassVar[list[IO[bytes]]] = []

    def __init__(self) -> None:
        super().__init__()
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(Path("items.bin").read_bytes())
        file.flush()
        Temporary.held[:] = [file]

    def read(self, row: int) -> bytes:
        Temporary.held[0].seek(row * SIZE)
        return Temporary.held[0].read(SIZE)


class Dropped(RawFile):
    """Its file is not pickled, and opened again when an item is read; its length needs the file."""

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"file": None}

    def __len__(self) -> int:
        return os.fstat(self.file.fileno()).st_size // SIZE


FACTORIES = (
    *(
        "Temporary",
        "Dropped",
        "RawFile",
        "ReadAndWrite",
        "Unbuffered",
        "Zip",
        "Database",
        "Mapped",
        "of_the_class",
        "of_the_module",
    ),
    *("Threads", "locked", "Sequence", "local", "with_function"),
)
