"""A run's directory: configuration, metrics, checkpoint. Everything a resumed run needs, and nothing pickled."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from gstds_cache.errors import FingerprintMismatchError, IntegrityError, UsageError
from gstds_cache.resources import writing

CONFIG, METRICS, CHECKPOINT, LEDGER = "config.json", "metrics.jsonl", "checkpoint.pt", "ledger.json"
OWN_NAMES = {name for stem in (CONFIG, METRICS, CHECKPOINT, LEDGER) for name in (stem, f".{stem}.tmp")}


class RunDir:
    """Reads and writes one run's files.

    Attributes:
        path: The directory.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], *, provenance: dict[str, Any], resume: bool, writes: bool = True
    ) -> None:
        """Check a new run's directory, or that of a run to be resumed; nothing is written before :meth:`begin`.

        Args:
            path: The directory.
            config: What decides the run's outcome; a run is resumed only with the same.
            provenance: What else to record.
            resume: Continue the run that is there; a directory without one starts a new run.
            writes: Whether this process writes; of several ranks the first does, and all read the checkpoint.

        Raises:
            UsageError: A run is there and ``resume`` is not set, or ``path`` is a file.
            FingerprintMismatchError: The run there has another configuration.
        """
        self.path, self._writes = path, writes
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path}: a file is in the way, expected a directory or nothing")
        strange = {entry.name for entry in path.iterdir()} - OWN_NAMES if path.is_dir() else set()
        stored = self._stored_config()
        if stored is None and strange:
            raise UsageError(
                f"--out {path}: the directory is not empty and holds no run (but {min(strange)!r})",
                hint="nothing was changed. Give the path of a new directory",
            )
        if stored is not None and not resume:
            raise UsageError(
                f"--out {path}: there is a run in it", hint="add --resume to continue it, or give another --out"
            )
        if stored is not None and stored != config:
            names = sorted(k for k in stored.keys() | config.keys() if stored.get(k) != config.get(k))
            raise FingerprintMismatchError(
                f"{path} is a run of another configuration:\n    "
                + "\n    ".join(f"{k}: the run has {stored.get(k)!r}, now {config.get(k)!r}" for k in names),
                hint="resume with the settings it was started with, or give another --out",
            )
        self._text = json.dumps({"config": config, "provenance": provenance}, indent=2, sort_keys=True) + "\n"

    def begin(self) -> None:
        """Make the directory of a new run; that of a run to be resumed stays as it is."""
        if not self._writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if self._stored_config() is None:
            self._replace(CONFIG, self._text.encode())
            (self.path / METRICS).unlink(missing_ok=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint of the run that is resumed, or None; tensors and numbers only.

        Raises:
            IntegrityError: It cannot be read.
        """
        path = self.path / CHECKPOINT
        if self._stored_config() is None:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise IntegrityError(
                f"{path} is damaged: {str(error).partition(chr(10))[0]}", hint="train again into another --out"
            ) from error
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; a killed write leaves the old one."""
        if not self._writes:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._replace(CHECKPOINT, buffer.getbuffer())

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if not self._writes:
            return
        with writing(self.path / METRICS), (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics, sort_keys=True) + "\n")

    def write_ledger(self, ledger: dict[str, Any]) -> None:
        """Replace ``ledger.json``."""
        self._replace(LEDGER, (json.dumps(ledger, indent=2, sort_keys=True) + "\n").encode())

    def drop_metrics_from(self, step: int) -> None:
        """Drop the lines of steps from ``step`` on, and final ones: a resumed run writes them again."""
        path = self.path / METRICS
        if self._writes and path.exists():
            # A line without its end was being written when the run was killed.
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            parsed = [(line, json.loads(line)) for line in whole]
            lines = [line for line, fields in parsed if fields["step"] < step and not fields.get("final")]
            self._replace(METRICS, "".join(lines).encode())

    def _stored_config(self) -> dict[str, Any] | None:
        """The configuration of the run that is there. One without a checkpoint holds nothing to continue or lose.

        Raises:
            UsageError: The file is there and is something else.
        """
        path = self.path / CONFIG
        if not path.exists() or not (self.path / CHECKPOINT).exists():
            return None
        try:
            config: dict[str, Any] = dict(json.loads(path.read_text())["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no configuration of a run", hint="give another --out") from error
        return config

    def _replace(self, name: str, data: bytes | memoryview) -> None:
        temporary = self.path / f".{name}.tmp"
        with writing(self.path / name), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
