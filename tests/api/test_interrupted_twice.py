"""Ctrl-C twice: the second one adds nothing to what the first one had said."""

from __future__ import annotations

import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from gstds_cache.cli.common import Command, Group

TWICE = """
import atexit, os, signal, threading, time
import click
from gstds_cache.cli.common import Command

def again():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)

def late():
    threading.main_thread().join(0.5)
    again()

@click.command(cls=Command)
def main():
    atexit.register(again)
    threading.Thread(target=late).start()
    raise KeyboardInterrupt

main()
"""


def test_a_second_interrupt_prints_no_trace() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGINT  # 130 to a shell: the second one ended it, while it was ending
    assert done.stderr == ("\ninterrupted: nothing that was committed is lost; run the same command again to go on\n")


@pytest.mark.parametrize("ends", [True, False])
def test_a_caller_that_goes_on_is_interrupted_as_before(ends: bool) -> None:
    @click.group(cls=Group)
    def main() -> None: ...

    @main.command("work", cls=Command)
    def work() -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    try:
        result = CliRunner().invoke(main, ["work"], standalone_mode=ends)
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted: nothing that was committed is lost" in result.output
    assert after is (signal.SIG_DFL if ends else signal.default_int_handler)
