"""Errors that a person can act on: what happened, what was got, what was expected, and the next command to type.

Every error carries the exit code of the command that ends with it, and a hint. All survive pickling, so that they can
cross a process border, and each subclasses the builtin a library user would expect to catch.

Messages name arguments, in backticks: ```knn`: got 0``, ``pass `knn=10` ``. A command writes its flags instead
(:func:`with_flags`).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import ClassVar

EXIT_USAGE = 2
EXIT_INTEGRITY = 3
EXIT_INCOMPLETE = 4
EXIT_SOLVER = 5
EXIT_INTERRUPT = 130


class GstdsError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: What happened, what was got and what was expected.
        hint: The next thing to do, usually a command; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[GstdsError], message: str, hint: str) -> GstdsError:
    return kind(message, hint=hint)


class UsageError(GstdsError, ValueError):
    """A flag, value or path that cannot be meant."""

    exit_code = EXIT_USAGE


class DatasetError(UsageError):
    """A data set that cannot be read as one."""


class EncoderError(UsageError):
    """A reference model that cannot be built or loaded."""


class StoreNotFoundError(UsageError, FileNotFoundError):
    """No store, or something else, at the path."""


class IntegrityError(GstdsError, RuntimeError):
    """What is on disk, or in a stream, is not what was promised."""

    exit_code = EXIT_INTEGRITY


class ChunkCorruptError(IntegrityError):
    """A committed object is missing, truncated or altered."""


class FingerprintMismatchError(IntegrityError):
    """Two things made from different data, models or settings were brought together."""


class NondeterminismError(IntegrityError):
    """The same shard was computed twice with different results."""


class StreamError(IntegrityError):
    """A selection record is damaged, out of sequence, or of an unknown format."""


class TruncatedStreamError(StreamError, EOFError):
    """A selection ended without its footer record."""


class ProducerFailedError(StreamError):
    """The producer of a selection reported an error (a kind-3 record)."""


class IncompleteError(GstdsError, RuntimeError):
    """Work that was begun and can be finished by running the same command again."""

    exit_code = EXIT_INCOMPLETE


class StoreUnavailableError(IncompleteError, ConnectionError):
    """A place for stores that does not answer, or refuses; what is there is unchanged."""


class SolverError(GstdsError, ArithmeticError):
    """An eigenproblem that has no answer."""

    exit_code = EXIT_SOLVER


class KernelError(GstdsError, RuntimeError):
    """A CUDA kernel that cannot be compiled, loaded or launched here."""


class DivergedError(SolverError):
    """A training loss that is no longer a number."""


def command_line(*words: object) -> str:
    """A command that can be pasted into a shell as it stands."""
    return shlex.join(str(word) for word in words)


_ARGUMENT = re.compile(r"`([a-z]\w*)(?:=([^`]+))?`")


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """An error's text for the command line.

    `` `knn` `` becomes ``--knn``, `` `knn=10` `` becomes ``--knn 10``, `` `page=False` `` becomes ``--no-page``.

    Args:
        text: Text that names arguments in backticks.
        flags: What the command calls each of its parameters, by argument.

    Returns:
        The text; arguments that the command does not have stay as they are.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in flags:
            return match[0]
        if value is None or value == "True":
            return flags[name]
        if value == "False":
            return f"--no-{flags[name].removeprefix('--').removeprefix('no-')}"
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        return f"{flags[name]} {shlex.quote(value)}"

    return _ARGUMENT.sub(flag, text)


def text_of(error: BaseException) -> str:
    """What an exception of someone else's code says; nothing where that fails as well."""
    try:
        return str(error)
    except Exception:
        return ""


def in_words(error: BaseException) -> str:
    """An exception of someone else's code on one line: its kind, and the line of its text that says most."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    text = lines[0] if lines else "it gives no reason"
    if len(lines) > 1 and text.startswith("The following operation failed in the TorchScript"):
        text = lines[-1]  # first come the lines of the compiled code
    elif len(lines) > 1 and text.endswith(":"):
        text = f"{text} {lines[1]}"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sort ``known`` by likeness to ``name``, nearest first; ties alphabetically."""
    return sorted(known, key=lambda k: (-difflib.SequenceMatcher(None, name.lower(), k.lower()).ratio(), k))


def unknown_name(what: str, name: str, known: Iterable[str], *, limit: int = 12) -> UsageError:
    """Build the usage error for a name that is not in a registry, listing what there is, nearest name first."""
    names = nearest_first(name, known)
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return UsageError(
        f"unknown {what} {name!r}; there are: {', '.join(names[:limit])}{more}",
        hint=f"did you mean {names[0]!r}?" if names else "",
    )
