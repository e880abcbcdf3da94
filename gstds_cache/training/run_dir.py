"""A run's directory: configuration, metrics, checkpoint. Everything a resumed run needs, and nothing pickled."""

from __future__ import annotations

import io
import json
import pickle
import threading
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from gstds_cache.config import TrainConfig
from gstds_cache.errors import FingerprintMismatchError, IncompleteError, IntegrityError, UsageError
from gstds_cache.files.atomic import atomic_write, writing, written_name
from gstds_cache.files.lock import exclusive
from gstds_cache.runtime.notify import log
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.training.checkpoint import Checkpoint
from gstds_cache.training.tracking import FOLDER as TRACKERS

CONFIG, METRICS, CHECKPOINT, LEDGER = "config.json", "metrics.jsonl", "checkpoint.pt", "ledger.json"
LOCK = ".lock"
FILES = (CONFIG, METRICS, CHECKPOINT, LEDGER)
LATER: dict[str, Any] = {"norm_samples": 0, "label_smoothing": 0.0, "importance_weights": False, "accumulate": 1,
                         "max_pixels": TrainConfig.max_pixels}  # fmt: skip
"""Settings that came after the first version: a configuration written without one is of a run that has this value."""
_DAMAGE = (BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError,
           TypeError, zlib.error)  # fmt: skip
"""What reading a checkpoint raises that was cut short, or in which some bits are others."""
UNRECORDED = ("precision",)
"""Settings that followed from the device alone: a configuration written without one agrees with any."""


class RunDir:
    """Reads and writes one run's files. Only one of all processes and threads can hold it, ``with run_dir:``.

    Attributes:
        path: The directory.
        config: What decides the run's outcome.
        provenance: What else is recorded.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], *, provenance: dict[str, Any], resume: bool, writes: bool = True
    ) -> None:
        """Check a new run's directory, or that of a run to be resumed; nothing is written before :meth:`begin`.

        It is checked again whenever it is entered: only then does nobody else write it.

        Args:
            path: The directory.
            config: What decides the run's outcome; a run is resumed only with the same.
            provenance: What else to record.
            resume: Continue the run that is there; a directory without one starts a new run.
            writes: Whether this process writes; of several ranks the first does, and all read the checkpoint.

        Raises:
            UsageError: A run is there and ``resume`` is not set, or ``path`` is a file.
            FingerprintMismatchError: The run there has another configuration.
            IncompleteError: Another process or thread writes it.
        """
        self.path, self._writes, self._resume = path, writes, resume
        self.config, self.provenance = config, provenance
        self._text = json.dumps({"config": config, "provenance": provenance}, indent=2, sort_keys=True) + "\n"
        self._entered, self._depth, self._holding = threading.RLock(), 0, ExitStack()
        self._check_strange()
        if path.is_dir():
            with self:
                pass

    def __enter__(self) -> RunDir:
        """Hold the directory: nobody else writes it until the block ends. The holder may enter again.

        Raises:
            UsageError: A run is there that is not to be resumed, or something else is.
            FingerprintMismatchError: The run there has another configuration.
            IncompleteError: Another process or thread writes it.
        """
        if not self._entered.acquire(blocking=False):
            raise IncompleteError(
                f"{self.path} is being written by another thread of this process",
                hint="give each its own directory, with a RunDir of its own",
            )
        try:
            if self._depth == 0:
                self._hold()
            self._depth += 1
        except BaseException:
            self._entered.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it go. A directory made for the block goes as well where nothing was written to it."""
        self._depth -= 1
        if self._depth == 0:
            self._holding.close()
        self._entered.release()

    def _hold(self) -> None:
        self._check_strange()
        with ExitStack() as holding:
            if self._writes:
                created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
                self._lock(holding)
                holding.callback(self._remove_unused, created)
            self._check()
            self._holding = holding.pop_all()

    def _lock(self, holding: ExitStack) -> None:
        for last in (False, False, True):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                holding.enter_context(exclusive(self.path / LOCK, of=self.path))
            except (
                FileNotFoundError
            ):  # another process ended in between, without having written, and removed the folder
                if last:
                    raise
            else:
                return

    def _remove_unused(self, created: list[Path]) -> None:
        """Remove the folders that were created, unless something was written to them; while the lock is held."""
        with suppress(OSError):
            if created and {entry.name for entry in self.path.iterdir()} == {LOCK}:
                (self.path / LOCK).unlink()
                for folder in created:  # until one is not empty
                    folder.rmdir()

    def _check_strange(self) -> None:
        """Refuse what is no run's directory, before even the lock is put into it.

        Raises:
            UsageError: It is a file, or holds something else.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise UsageError(f"`out`: {path} is a file, expected a directory or nothing")
        strange = {entry.name for entry in path.iterdir() if not _own(entry.name)} if path.is_dir() else set()
        if strange and stored_config(path) is None:
            raise UsageError(
                f"`out`: {path} is not empty and holds no run (but {min(strange)!r})",
                hint="nothing was changed. Give the path of a new directory",
            )

    def _check(self) -> None:
        """Refuse a run that is there and is not to be resumed.

        Raises:
            UsageError: It is not to be resumed.
            FingerprintMismatchError: It has another configuration.
        """
        path, stored, config = self.path, stored_config(self.path), self.config
        if stored is not None and not self._resume:
            raise UsageError(f"`out`: {path} holds a run", hint="pass `resume=True` to continue it, or another `out`")
        if stored is not None:
            unrecorded = {name: config[name] for name in UNRECORDED if name in config}
            stored = unrecorded | {name: value for name, value in LATER.items() if name in config} | stored
        if stored is not None and stored != config:
            names = sorted(k for k in stored.keys() | config.keys() if stored.get(k) != config.get(k))
            raise FingerprintMismatchError(
                f"{path} is a run of another configuration:\n    "
                + "\n    ".join(f"{k}: the run has {stored.get(k)!r}, now {config.get(k)!r}" for k in names),
                hint="resume with the settings it was started with, or pass another `out`",
            )

    def begin(self) -> None:
        """Begin a new run in the directory; that of a run to be resumed stays as it is. Within ``with run_dir:``."""
        if not self._writes:
            return
        for entry in self.path.iterdir():
            if _temporary(entry.name):
                entry.unlink(missing_ok=True)
        if stored_config(self.path) is None:
            self._replace(CONFIG, self._text.encode())
            (self.path / METRICS).unlink(missing_ok=True)
        self._resume = True  # what is there from now on is this run

    def load_checkpoint(self) -> Checkpoint | None:
        """The checkpoint of the run that is resumed, or None. No code in it is run.

        Raises:
            IntegrityError: It is damaged, or is no checkpoint.
        """
        path = self.path / CHECKPOINT
        if stored_config(self.path) is None:
            return None
        try:
            _check_crcs(path)
            return Checkpoint.from_state(torch.load(path, map_location="cpu", weights_only=True))
        except _DAMAGE as error:
            if out_of_memory(error):
                raise
            raise IntegrityError(
                f"{path} is damaged: {str(error).partition(chr(10))[0]}",
                hint="no step can be gone on from: put a copy of the file back, or train again into another `out`",
            ) from error

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; a killed write leaves the old one."""
        if not self._writes:
            return
        buffer = io.BytesIO()
        torch.save(checkpoint.to_state(), buffer)
        self._replace(CHECKPOINT, buffer.getbuffer())

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if not self._writes:
            return
        with writing(self.path / METRICS), (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics, sort_keys=True) + "\n")

    def ledger(self) -> dict[str, Any]:
        """The ledger of an earlier session; empty where there is none, or none that can be read."""
        try:
            found = json.loads((self.path / LEDGER).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_ledger(self, ledger: dict[str, Any]) -> None:
        """Replace ``ledger.json``."""
        with self:
            self._replace(LEDGER, (json.dumps(ledger, indent=2, sort_keys=True) + "\n").encode())

    def drop_metrics_from(self, step: int) -> None:
        """Drop the lines of steps from ``step`` on, and final ones: a resumed run writes them again.

        Lines that are damaged go as well, with a note: no step needs them.
        """
        path = self.path / METRICS
        if self._writes and path.exists():
            # What follows the last line end was being written when the run was killed.
            whole = path.read_bytes().split(b"\n")[:-1]
            read = [(line, *_step_of(line)) for line in whole]
            damaged = sum(at is None for _, at, _ in read)
            if damaged:
                log(f"note: {path}: {damaged} of {len(whole)} lines were damaged and are dropped")
            kept = [line + b"\n" for line, at, final in read if at is not None and at < step and not final]
            self._replace(METRICS, b"".join(kept))

    def _replace(self, name: str, data: bytes | memoryview) -> None:
        path = self.path / name
        with atomic_write(path, durable=True, leftovers="all") as file:
            file.write(data)


def stored_config(run_dir: Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory. One without a checkpoint holds nothing to continue or lose.

    Raises:
        UsageError: The file is there and is something else.
    """
    path = run_dir / CONFIG
    if not path.exists() or not (run_dir / CHECKPOINT).exists():
        return None
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no configuration of a run", hint="pass another `out`") from error
    return config


def _step_of(line: bytes) -> tuple[int | None, bool]:
    """The step of a line of metrics, None of one that is damaged; and whether it is the final one."""
    try:
        fields = json.loads(line)
        return int(fields["step"]), bool(fields.get("final"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, False


def _check_crcs(path: Path) -> None:
    """Compare what ``torch.save`` wrote with its CRCs, which ``torch.load`` does not.

    Raises:
        BadZipFile: One is another.
    """
    with ZipFile(path) as file:
        broken = file.testzip()
    if broken is not None:
        raise BadZipFile(f"the CRC of {broken} is another than the one that was written")


def _own(name: str) -> bool:
    return name in {*FILES, LOCK, TRACKERS} or _temporary(name)


def _temporary(name: str) -> bool:
    """Whether a killed process left it; a run of before had no process's number in the name."""
    return name in {f".{file}.tmp" for file in FILES} or written_name(name) in FILES
