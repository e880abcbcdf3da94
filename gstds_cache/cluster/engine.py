"""``engine=``: where work runs. Parsed here; ray is imported only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from gstds_cache.config import ENGINE
from gstds_cache.errors import UsageError
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.notify import Notify

EXPECTED = "local, ray, or ray:HOST:PORT"


@dataclass(frozen=True)
class Engine:
    """Where work runs.

    Attributes:
        ray: Whether on a Ray cluster; else in this process.
        address: The cluster's; None for the one there is, or one that is started for the call.
        gpus_per_task: GPUs, or the part of one, that each task has; None for one where the model runs on a GPU.
    """

    ray: bool = False
    address: str | None = None
    gpus_per_task: float | None = None

    @classmethod
    def parse(cls, engine: object, gpus_per_task: object = None) -> Engine:
        """Parse what a user named.

        Args:
            engine: ``local``, ``ray`` or ``ray:ADDRESS``.
            gpus_per_task: A number above 0 and up to 1, or None.

        Returns:
            The engine.

        Raises:
            UsageError: It cannot be meant.
        """
        if not isinstance(engine, str):
            raise UsageError(f"`engine`: got {engine!r:.80}, expected {EXPECTED}")
        kind, colon, address = engine.partition(":")
        if kind not in {ENGINE, "ray"} or (colon and not (kind == "ray" and address)):
            raise UsageError(f"`engine`: got {engine!r:.80}, expected {EXPECTED}")
        if gpus_per_task is None:
            return cls(kind == "ray", address or None)
        if kind != "ray":
            raise UsageError("`gpus_per_task` says what a task of Ray has: it needs `engine='ray'`")
        if isinstance(gpus_per_task, bool) or not isinstance(gpus_per_task, int | float) or not 0 < gpus_per_task <= 1:
            raise UsageError(
                f"`gpus_per_task`: got {gpus_per_task!r:.80}, expected a number above 0 and up to 1",
                hint="a task uses one GPU, or a part of one; several GPUs of a node are used by several tasks",
            )
        return cls(True, address or None, float(gpus_per_task))

    @contextmanager
    def opened(self, notify: Notify) -> Iterator[Executor | None]:
        """Be ready to run work there while the block lasts.

        Args:
            notify: Told of workers, the rate, retries and what is slow.

        Yields:
            Where it runs; None for this process.
        """
        if not self.ray:
            yield None
            return
        from gstds_cache.cluster.executor import RayExecutor
        from gstds_cache.cluster.session import connected, is_to_start

        with ExitStack() as stack:
            start: Callable[[], None] | None = partial(stack.enter_context, connected(self.address))
            if start is not None and not is_to_start(self.address):
                start()
                start = None
            # Starting a cluster takes seconds: it waits until there is work.
            yield RayExecutor(notify=notify, gpus_per_task=self.gpus_per_task, start=start)
