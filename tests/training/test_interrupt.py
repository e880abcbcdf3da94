from __future__ import annotations

import os
import signal

import pytest

from gstds_cache.training.interrupt import stop_after_step


def test_the_first_ctrl_c_asks_and_the_second_interrupts_at_once() -> None:
    before, lines = signal.getsignal(signal.SIGINT), list[str]()
    with pytest.raises(KeyboardInterrupt), stop_after_step(lines.append) as asked:  # noqa: PT012
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second was not heard")
    assert lines == ["stopping after this step (Ctrl-C again: at once)"]
    assert signal.getsignal(signal.SIGINT) is before
