from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gstds_cache import errors


def _all_kinds() -> list[type[errors.GstdsError]]:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in kinds if issubclass(kind, errors.GstdsError)]


@pytest.mark.parametrize("kind", _all_kinds(), ids=lambda kind: kind.__name__)
def test_every_error_survives_a_process_border(kind: type[errors.GstdsError]) -> None:
    error = kind("what, got 1, expected 2", hint="type this")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.message, again.hint) == ("what, got 1, expected 2", "type this")
    assert str(again) == "what, got 1, expected 2\n  type this"


@pytest.mark.parametrize(
    ("kind", "builtin", "code"),
    [
        (errors.UsageError, ValueError, 2),
        (errors.StoreNotFoundError, FileNotFoundError, 2),
        (errors.ChunkCorruptError, RuntimeError, 3),
        (errors.TruncatedStreamError, EOFError, 3),
        (errors.IncompleteError, RuntimeError, 4),
        (errors.SolverError, ArithmeticError, 5),
    ],
)
def test_errors_are_the_builtins_one_would_catch(kind: type, builtin: type, code: int) -> None:
    assert issubclass(kind, builtin)
    assert kind.exit_code == code


def test_an_unknown_name_lists_the_nearest_first() -> None:
    error = errors.unknown_name("rule", "coverge", ["random", "gap", "coverage"])
    assert error.message.startswith("unknown rule 'coverge'; there are: coverage, ")
    assert error.hint == "did you mean 'coverage'?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`knn`: got 0, expected 1 to 39", "--knn: got 0, expected 1 to 39"),
        ("pass `knn=10`", "pass --knn 10"),
        ("pass `order='window:4 096'`", "pass --order 'window:4 096'"),
        ("pass `order='window:ROWS'` or `allow_untrained=True`", "pass --order window:ROWS or --allow-untrained"),
        ("pass `page=False`, or `cuda_graphs=False`", "pass --no-page, or --no-cuda-graphs"),
        ("`x` has a NaN in `metrics.jsonl`", "`x` has a NaN in `metrics.jsonl`"),
    ],
)
def test_a_command_names_flags_where_the_library_names_arguments(text: str, expected: str) -> None:
    flags = {"knn": "--knn", "order": "--order", "allow_untrained": "--allow-untrained", "page": "--page"}
    flags |= {"cuda_graphs": "--no-cuda-graphs"}  # which has no other
    assert errors.with_flags(text, flags) == expected


PACKAGE = Path(errors.__file__).parent


def _texts(node: ast.AST) -> Iterator[str]:
    """Every text below ``node`` but the words of whole commands, which ``command_line`` and ``embed_command`` build."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command_line":
        return
    if isinstance(node, ast.FunctionDef) and node.name == "embed_command":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)


def test_the_library_names_arguments_and_no_flags() -> None:
    command = "hint = 'pass --knn or ' + command_line('gstds-embed', '--model')"
    assert list(_texts(ast.parse(command))) == ["pass --knn or "]
    texts = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "errors.py"  # its docstrings explain how a command's flags come about
        and not path.is_relative_to(PACKAGE / "cli")
        for text in _texts(ast.parse(path.read_text()))
        if re.search(r"(?<![\w-])--[a-z]", text)
    }
    assert not texts
