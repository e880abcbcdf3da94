"""What all commands share: how errors end, how progress shows, how results print."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from gstds_cache.config import DEVICE, ENGINE
from gstds_cache.errors import (
    EXIT_INCOMPLETE,
    EXIT_INTERRUPT,
    GstdsError,
    IncompleteError,
    StoreNotFoundError,
    UsageError,
    command_line,
    with_flags,
)
from gstds_cache.files.location import local_file
from gstds_cache.runtime.resources import explain

F = TypeVar("F", bound=Callable[..., Any])
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Program(click.Command):
    """What is called as a program, or by a caller that goes on after it.

    Attributes:
        ends_process: Whether the process ends with it.
    """

    ends_process = False

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's."""
        self.ends_process = standalone_mode
        return super().main(args, prog_name, complete_var, standalone_mode, **extra)


class Command(Program):
    """A command that ends with one clear message and the exit code of the error tree.

    Anything unexpected keeps its traceback.
    """

    def __init__(self, *arguments: Any, renamed: Mapping[str, str] | None = None, **attributes: Any) -> None:
        """Make the command.

        Args:
            arguments: As click's command takes them.
            renamed: Flags that had another name before, by that name: it goes on working.
            attributes: As click's command takes them.
        """
        super().__init__(*arguments, **attributes)
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Replace flags by their new names, and say so."""
        words = []
        for word in args:
            flag, equals, value = word.partition("=")
            if flag in self.renamed:
                click.echo(f"note: {flag} is now called {self.renamed[flag]}", err=True)
                word = self.renamed[flag] + equals + value  # noqa: PLW2901 - in its place
            words.append(word)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            OSError: One that no lack of disk, files, memory or processes explains; so for the others.
            MemoryError: Never: it is explained.
            RuntimeError: One that is not about memory or files.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: names may be in another encoding
        try:
            return super().invoke(ctx)
        except GstdsError as error:
            click.echo(f"error: {shown(with_flags(str(error), flags_of(ctx.command)))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            ends = getattr(ctx.find_root().command, "ends_process", False)
            if ends:
                _on_interrupt(signal.SIG_IGN)
            go_on = error.args[0] if error.args else "run the same command again to go on"
            go_on = with_flags(go_on, flags_of(ctx.command))
            click.echo(f"\ninterrupted: nothing that was committed is lost; {go_on}", err=True)
            if ends:
                _on_interrupt(signal.SIG_DFL)
            ctx.exit(EXIT_INTERRUPT)
        except BrokenPipeError:
            # Whoever read our stdout is gone. Python would complain again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo("error: the reader of this command's output went away before the end", err=True)
            ctx.exit(EXIT_INCOMPLETE)
        except (OSError, MemoryError, RuntimeError) as error:
            told = explain(error)
            if told is None:
                raise
            click.echo(f"error: {shown(with_flags(str(told), flags_of(ctx.command)))}", err=True)
            ctx.exit(told.exit_code)


def _on_interrupt(handler: signal.Handlers) -> None:
    """A second Ctrl-C waits for the message of the first; then it ends the process at once, and prints no trace."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def notify(line: str) -> None:
    """Print a line for the user on stderr, in the flags of the running command: what a public call notifies."""
    context = click.get_current_context(silent=True)  # a service's own threads have none; its lines name no arguments
    click.echo(shown(with_flags(line, {} if context is None else flags_of(context.command))), err=True)


def shown(text: str) -> str:
    r"""Spell control characters as ``\xNN``, all but tabs and line ends, which a terminal would obey."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def flags_of(command: click.Command) -> dict[str, str]:
    """What ``command`` calls each of its parameters: a flag, or the word of an argument."""
    return {
        parameter.name: max(parameter.opts or parameter.secondary_opts, key=len)
        if isinstance(parameter, click.Option)
        else parameter.name.upper()
        for parameter in command.params
        if parameter.name
    }


def setting_option(config: type, name: str, **attributes: Any) -> Callable[[F], F]:
    """Adds the option of one field of a configuration, whose type and default it has.

    Args:
        config: The configuration, a dataclass.
        name: The field.
        attributes: What click's option takes besides; ``flags`` for names other than the field's.

    Returns:
        A decorator.
    """
    field = next(field for field in fields(config) if field.name == name)
    kind = get_type_hints(config)[name]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kinds: list[Any] = [part for part in (get_args(kind) or (kind,)) if part is not NoneType]
    flags = attributes.pop("flags", ("--" + name.replace("_", "-"),))
    attributes.setdefault("type", click.Choice(choices) if choices else kinds[0])
    if kind is bool:
        attributes = {"is_flag": True} | {key: value for key, value in attributes.items() if key != "type"}
    if field.default is not None:
        attributes.setdefault("show_default", kind is not bool)
    return click.option(*flags, name, default=field.default, **attributes)


class Group(Program, click.Group):
    """A group of :class:`Command`."""

    command_class = Command


def json_option(function: F) -> F:
    """Adds ``--json``."""
    text = "Print the result as one JSON object, the last line of stdout (of stderr, where stdout is the stream)."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def device_option(function: F) -> F:
    """Adds ``--device``."""
    return click.option(
        "--device", default=DEVICE, show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
    )(function)


def engine_option(function: F) -> F:
    """Adds ``--engine``."""
    text = (
        "Where it runs: local, in this process; ray, on the cluster of $RAY_ADDRESS, or one that is started on this "
        "machine for the run; or ray:HOST:PORT. Needs pip install 'gstds-cache[ray]'."
    )
    return click.option("--engine", default=ENGINE, show_default=True, metavar="ENGINE", help=text)(function)


class LocalPath(click.Path):
    """A path on this machine; ``~`` is a home also in quotes, and ``file:///path`` is that path."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the word."""
        try:
            path = local_file(value, "path")
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return super().convert(path, param, ctx)


class Workers(click.ParamType[int | None]):
    """A number of processes, or ``auto``, which is None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Parse the word."""
        if value is None or value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"got {value!r}, expected a number or auto", param, ctx)


def workers_option(function: F) -> F:
    """Adds ``--workers``."""
    return click.option(
        "--workers",
        type=Workers(),
        default="auto",
        show_default=True,
        help="Processes that decode images, 0 for none beside this one. auto: one for every four cores, at least one; "
        "with CUDA one for every core; none for a few small images.",
    )(function)


def print_json(result: dict[str, Any], *, err: bool = False) -> None:
    """Print ``result`` on one line."""
    click.echo(json.dumps(result, sort_keys=True), err=err)


def print_table(rows: list[tuple[str, str]], *, err: bool = False) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {shown(value)}", err=err)


def next_selection(store: str) -> str:
    """What to type after a store was made: with labels, drawing as its embeddings advise."""
    from gstds_cache.selection.rows import count_labels
    from gstds_cache.store.reader import EmbeddingStore

    more: tuple[str, ...] = ()
    with suppress(IncompleteError, StoreNotFoundError):  # another process may be at the store by now
        labels = count_labels(EmbeddingStore(store))
        more = ("--draw", "auto") if labels.different > 1 and not labels.one_each else ()
    return f"next: {command_line('gstds-select', store, *more)}"


def seconds_line(seconds: dict[str, float]) -> str:
    """Phases and their seconds on one line, the total last."""
    return ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items() if phase == "total" or value >= 0.05)
