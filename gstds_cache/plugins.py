"""Users' own functions by name: ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gstds_cache.errors import unknown_name


def load_factory(name: str, what: str, kinds: Iterable[str] = ()) -> Callable[..., Any]:
    """Import ``package.module:function``; the current directory counts as importable, as it does for ``python -m``.

    Args:
        name: The module's dotted name, a colon, and the function's name.
        what: What it is for, in errors, e.g. ``model``.
        kinds: Other spellings the caller accepts, listed in the error.

    Returns:
        The function.

    Raises:
        UsageError: There is no such module, or no such function in it.
        ModuleNotFoundError: The module is there, but something it imports is not.
    """  # noqa: DOC501
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise unknown_name(f"kind of {what}, or module", name, kinds) from error
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"{what} in module {module_name}", attribute, names)
    return found  # type: ignore[no-any-return]
