"""``torch.compile`` for what a step does, and what a user is told where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gstds_cache.errors import UsageError

Scores = Callable[[Tensor], Tensor]
Mode = Literal["off", "default", "reduce-overhead"]
F = TypeVar("F", bound=Callable[..., Tensor])


def compiled(function: F, mode: Mode) -> F:
    """``function``, compiled on its first call; for any batch size from the second size on.

    Args:
        function: What is computed.
        mode: The setting ``compile``.

    Returns:
        A function that computes the same up to rounding, or ``function`` itself.
    """
    if mode == "off":
        return function
    return torch.compile(function, mode=mode)  # type: ignore[return-value]


@contextmanager
def explained(mode: Mode, *, when: bool) -> Iterator[None]:
    """What ``torch.compile`` raises becomes an error with a remedy.

    Args:
        mode: The setting ``compile``.
        when: Whether this step may compile.

    Yields:
        Nothing.

    Raises:
        UsageError: It could not compile.
    """  # noqa: DOC501 - what comes after the warm-up is passed on
    if mode == "off":
        yield
        return
    if mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings() if when else nullcontext():
            if when:  # float32 is what was asked for: `precision` is how it is said otherwise
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
            yield
    except TorchDynamoException as error:
        if not when:
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]  # what raised, then what it says
        raise UsageError(
            f"`compile`: torch cannot compile this network here: {' '.join(said[:2]) or type(error).__name__}",
            hint="it needs a C compiler (gcc or clang) and every package that torch compiles with; pass "
            "`compile='off'` to train without",
        ) from error
