"""Users' own functions by name, ``package.module:function``: found, called, and their errors told as theirs."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from gstds_cache.errors import GstdsError, UsageError, in_words, unknown_name
from gstds_cache.files.digest import sha256_file

# Frames in these folders say nothing about where a user's own code went wrong.
_NOT_THEIRS = (f"{sysconfig.get_path('stdlib')}/", f"{Path(__file__).parent}/", "<")
_SEEN = WeakKeyDictionary[ModuleType, tuple[ModuleSpec, str]]()
"""Of modules of users' own: what they were imported by, and the SHA-256 of their file then."""


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Make modules in ``folder`` importable for the length of a ``with`` block; '' changes nothing."""
    if not folder:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # a module may have changed the path itself
            sys.path.remove(folder)


def load_factory(name: str, what: str, kinds: Iterable[str] = ()) -> Callable[..., Any]:
    """Import ``package.module:function``; the current directory counts as importable, as it does for ``python -m``.

    Args:
        name: The module's dotted name, a colon, and the function's name.
        what: What it is for, in errors, e.g. ``model``.
        kinds: Other spellings the caller accepts, listed in the error.

    Returns:
        The function.

    Raises:
        UsageError: There is no such module or no such function in it, or the module cannot be imported.
    """  # noqa: DOC501
    module_name, _, attribute = name.partition(":")
    if not module_name:
        raise UsageError(f"{what} {name!r}: it names no module", hint="write module:function, as in own:function")
    trace = f"to see the whole trace: python -c 'import {module_name}'"
    try:
        with importable(str(Path.cwd())), own_code(f"importing {module_name}", hint=trace):
            module = importlib.import_module(module_name)
            found = getattr(module, attribute, None)
        source_digest(module)  # of what was imported, whatever becomes of the file; and so of the next
        if callable(found):
            source_digest(found)
    except UsageError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
            raise
        if f"{module_name}.".startswith(f"{cause.name}."):
            unknown = unknown_name(f"kind of {what}, or module", name, kinds)
            looked = f"a module {module_name} is looked for in the current directory and on PYTHONPATH"
            raise UsageError(unknown.message, hint=f"{unknown.hint} {looked}".strip()) from cause
        raise UsageError(f"{module_name} imports what is not installed: {cause}", hint=error.hint) from cause
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"{what} in module {module_name}", attribute, names)
    return found  # type: ignore[no-any-return]


def call_factory(
    factory: Callable[..., Any], name: str, params: Mapping[str, str], *, what: str, kind: type[UsageError]
) -> Any:
    """Call a user's factory. Arguments that do not fit it are told as such; what it raises itself, as its own error.

    Args:
        factory: The function.
        name: ``package.module:function``.
        params: Its keyword arguments.
        what: What is being made, in errors, e.g. ``model 'mine:build'``.
        kind: Class of the errors.

    Returns:
        What the factory returns.

    Raises:
        UsageError: The arguments do not fit, or the factory raised something.
    """
    call = f"{what}: the call {name}({', '.join(f'{key}={value!r}' for key, value in params.items())})"
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # compiled functions may have none
        signature = None
    if signature is not None:
        try:
            signature.bind(**params)
        except TypeError as error:
            raise kind(
                f"{call} failed: {error}; it takes {signature}",
                hint="query parameters are passed to the factory by name, as strings",
            ) from error
    with own_code(call, kind):
        return factory(**params)


def source_digest(function: Callable[..., Any] | ModuleType) -> str:
    """SHA-256 of the file of a function or module, so that a changed function is another identity; '' without one.

    It is taken when :func:`load_factory` or this first sees the module, and again when that is imported or reloaded: a
    file that is edited later is not the code that runs. Of a module that was imported before, and whose file was edited
    before it was first seen here, nobody knows: the digest is of the edited file.

    Args:
        function: The function or module.

    Returns:
        64 hexadecimal digits, or ''.
    """
    name = function.__name__ if isinstance(function, ModuleType) else getattr(function, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return ""
    if not file:
        return ""
    spec = getattr(module, "__spec__", None)
    if module is None or spec is None or getattr(module, "__file__", None) != file:
        return _digest_now(file)
    seen = _SEEN.get(module)
    if seen is None or seen[0] is not spec:  # reloading a module gives it another specification
        seen = _SEEN[module] = spec, _digest_now(file)
    return seen[1]


def _digest_now(file: str) -> str:
    return sha256_file(Path(file)) if Path(file).is_file() else ""


def _nothing(_error: BaseException) -> bool:
    return False


@contextmanager
def own_code(
    what: str,
    kind: type[GstdsError] = UsageError,
    hint: str = "correct it there, then run the same command again",
    *,
    but: Callable[[BaseException], bool] = _nothing,
) -> Iterator[None]:
    """Turn any exception of a user's own code into one error: what it said, and where.

    Args:
        what: What was being done.
        kind: Class of the error.
        hint: What to do.
        but: Says of an exception whether it passes through, as it is not the code's own.

    Yields:
        Nothing; the code runs inside.

    Raises:
        GstdsError: Of class ``kind``. Ours pass through.
        KeyboardInterrupt: It passes through.
        GeneratorExit: It passes through.
    """
    try:
        yield
    except GstdsError:
        raise
    except SystemExit as error:
        # A script without "if __name__ == '__main__'" parses our arguments when it is imported, and ends the program.
        raise kind(
            f"{what} ended the program: SystemExit({error.code!r}){where_in(error)}",
            hint="raise an error where something is wrong; what a script runs belongs under if __name__ == '__main__'",
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also what is no Exception: panics of libraries written in Rust
        if but(error):
            raise
        raise kind(f"{what} failed: {in_words(error)}{where_in(error)}", hint=hint) from error


def where_in(error: BaseException) -> str:
    """`` (FILE:LINE)``: the innermost place of ``error`` that is in no installed library, or ''."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_shown(error.filename)}:{error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THEIRS) and "-packages/" not in frame.filename:
            return f" ({_shown(frame.filename)}:{frame.lineno})"
    return ""


def _shown(file: str) -> str:
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file
