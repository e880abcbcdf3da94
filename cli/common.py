"""What all commands share: how errors end, how progress shows, how results print."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from gstds_cache.errors import EXIT_INCOMPLETE, EXIT_INTERRUPT, GstdsError, UsageError, with_flags
from gstds_cache.files.location import Location, local_file
from gstds_cache.runtime.resources import explain

if TYPE_CHECKING:
    from gstds_cache.data.source import ImageSource

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
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
            click.echo(f"error: {with_flags(str(error), flags_of(ctx.command))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            go_on = error.args[0] if error.args else "run the same command again to go on"
            click.echo(f"\ninterrupted: nothing that was committed is lost; {go_on}", err=True)
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
            click.echo(f"error: {with_flags(str(told), flags_of(ctx.command))}", err=True)
            ctx.exit(told.exit_code)


def notify(line: str) -> None:
    """Print a line for the user on stderr, in the flags of the running command: what a public call notifies."""
    click.echo(with_flags(line, flags_of(click.get_current_context().command)), err=True)


def flags_of(command: click.Command) -> dict[str, str]:
    """What ``command`` calls each of its parameters: a flag, or the word of an argument."""
    return {
        parameter.name: max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.name.upper()
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


class Group(click.Group):
    """A group of :class:`Command`."""

    command_class = Command


def json_option(function: F) -> F:
    """Adds ``--json``."""
    text = "Print the result as one JSON object, the last line of stdout (of stderr, where stdout is the stream)."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def device_option(function: F) -> F:
    """Adds ``--device``."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
    )(function)


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
        "with CUDA all cores but two; none for a few small images.",
    )(function)


def warn_if_inside(source: ImageSource, path: str | Path | None, *, what: str, flag: str) -> None:
    """Warn where what is to be written would lie in the image folder that is read.

    Args:
        source: The data set.
        path: Where it is written; a bucket and None lie nowhere.
        what: What it is, in words.
        flag: How to name another place.
    """
    place = None if path is None else Location.parse(path).path
    if not source.kind.startswith("imagefolder") or source.files is None or place is None:
        return
    folder = Path(source.files.folder)
    # os.path, whose realpath ends where a link leads back to itself
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(place)).parents:
        click.echo(
            f"warning: {what} {path} lies inside the image folder {folder}; it is not taken for a class, but other "
            f"programs may do so: give {flag} outside of it",
            err=True,
        )


def print_json(result: dict[str, Any], *, err: bool = False) -> None:
    """Print ``result`` on one line."""
    click.echo(json.dumps(result, sort_keys=True), err=err)


def print_table(rows: list[tuple[str, str]], *, err: bool = False) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}", err=err)


def seconds_line(seconds: dict[str, float]) -> str:
    """Phases and their seconds on one line, the total last."""
    return ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items() if phase == "total" or value >= 0.05)


def shares_line(shares: Mapping[str, float]) -> str:
    """Shares of the time by name, on one line."""
    return ", ".join(
        f"{name} {share:.1%}" if 0 < share < 0.01 else f"{name} {share:.0%}" for name, share in shares.items()
    )


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal, plain lines every 10 seconds elsewhere."""

    def __init__(self, unit: str, waiting_for: str, **other_units: str) -> None:
        """Name what is counted and what is waited for.

        Args:
            unit: What is counted, e.g. ``images``.
            waiting_for: What the device may have to wait for, e.g. ``images``.
            other_units: What is counted in a phase that counts something else, by phase.
        """
        self.unit, self.waiting_for, self.other_units = unit, waiting_for, other_units
        self._tty = sys.stderr.isatty()
        self._phase, self._begun, self._first, self._shown, self._drawn = "", 0.0, 0, 0.0, False

    def __call__(self, phase: str, done: int, total: int, time_spent: float | Mapping[str, float]) -> None:
        """Show ``done`` of ``total``.

        Args:
            phase: What is going on.
            done: How much is done.
            total: Of how much.
            time_spent: The share of time the device had nothing to do, or several shares by name.
        """
        now = time.monotonic()
        if phase != self._phase:
            self.end()
            self._phase, self._begun, self._first, self._shown = phase, now, done, now
        if now - self._shown < (0.2 if self._tty else 10):
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        if isinstance(time_spent, Mapping):
            share = f", {shares_line(time_spent)}" if time_spent else ""
        else:
            share = f", waited for {self.waiting_for} {time_spent:.0%} of the time" if time_spent else ""
        unit = self.other_units.get(phase, self.unit)
        text = (
            f"{phase}: {done:,} of {total:,} {unit} ({done / max(total, 1):.0%}), {rate:,.1f}/s, "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}{share}"
        )
        click.echo(f"\r{text}\x1b[K" if self._tty else text, err=True, nl=not self._tty)
        self._drawn = self._tty

    def end(self) -> None:
        """Finish a line that is being rewritten."""
        if self._drawn:
            click.echo("", err=True)
        self._drawn = False


@contextmanager
def stop_after_step() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request that the loop asks for; the second interrupts at once.

    Yields:
        A function that says whether to stop.
    """
    asked = False

    def on_interrupt(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo("\nstopping after this step (Ctrl-C again: at once)", err=True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
