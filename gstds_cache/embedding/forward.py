"""The model's forward passes of a run; where the GPU decodes as well, recorded in a CUDA graph and replayed.

A forward pass of the default model is some 200 kernels. The host took 10 ms to start them for a batch of 256, on which
an H200 works for 16: time that it does not have beside what it does for decoding (docs/models.md). All batches of a run
have one shape, so one recording does. Where Pillow decodes, the GPU waits for images and not for the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float32, UInt8

from gstds_cache.embedding.decoding import streams_are_apart
from gstds_cache.embedding.device_decoding import decoding_paused
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.errors import EncoderError
from gstds_cache.runtime.notify import log
from gstds_cache.runtime.recording import (
    MARGIN,
    Outputs,
    can_allocate,
    place,
    recordable,
    recording,
    watched,
    why_it_failed,
)

EAGER = 4
"""Batches that are embedded without: the first ones load kernels, and of a small run nothing is recorded."""
RECORDED = ("timm:", "torchvision:")
"""Models that are. A module of one's own may compile itself, or wait for the GPU in some batches alone."""


class ForwardPasses:
    """Queues the forward passes of a run, whose batches all have one size."""

    def __init__(self, encoder: Encoder, device: torch.device, *, cuda_graphs: bool = True) -> None:
        """Nothing is recorded yet.

        Args:
            encoder: The model, on ``device``.
            device: Where.
            cuda_graphs: Whether passes are recorded, where they can be and that is quicker.
        """
        self._encoder, self._device = encoder, device
        self._replay: Callable[[torch.Tensor], Outputs] | None = None
        decodes = encoder.spec.preprocessing.decoder != "pillow" and streams_are_apart()
        record = cuda_graphs and decodes and recordable(device) and encoder.spec.model.startswith(RECORDED)
        self._left = EAGER if record else 0

    def __call__(self, pixels: UInt8[torch.Tensor, "B 3 H W"]) -> Float32[torch.Tensor, "B D"]:
        """What :meth:`Encoder.queue` gives; recorded or not, the same bits.

        Args:
            pixels: On the device.

        Raises:
            EncoderError: The model failed, or its forward pass cannot be recorded.
        """
        if self._replay is not None:
            with self._encoder.model_errors():
                return self._replay(pixels)[0]
        if self._left != 1:
            self._left = max(0, self._left - 1)
            return self._encoder.queue(pixels)
        self._left = 0
        # What is watched is of the whole process, and CUDA forbids other threads some calls during a recording. The
        # thread that commits makes none.
        with decoding_paused():
            with watched(self._device) as seen:
                rows = self._encoder.queue(pixels)
            if seen.waits:
                self._tell(f"the host waits for the GPU in it: {seen.waits[0]:.200}")
            elif can_allocate(int(seen.allocated * MARGIN[0]) + MARGIN[1], self._device):
                self._record(pixels, rows)
            else:
                self._tell(f"a pass takes {seen.allocated >> 20:,} MiB, and there is no room to record it as well")
        return rows

    def _record(self, pixels: UInt8[torch.Tensor, "B 3 H W"], rows: Float32[torch.Tensor, "B D"]) -> None:
        """Record a pass, and keep the recording if it gives ``rows`` of ``pixels``, as the pass without did.

        Raises:
            EncoderError: It cannot be recorded. This process can embed no more on that GPU.
        """
        try:
            # Tensors of a caller's inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                replay = recording(self._queue, pixels.clone(), self._device, **place(self._device))
        except (RuntimeError, EncoderError) as error:
            raise EncoderError(
                f"{self._encoder.spec.model}: its forward pass cannot be recorded in a CUDA graph here: "
                f"{why_it_failed(error)}",
                hint="pass `cuda_graphs=False`, in a new process; it goes on from what is committed",
            ) from error
        with self._encoder.model_errors():
            same = torch.equal(replay(pixels)[0].view(torch.int32), rows.view(torch.int32))  # NaN is NaN
        if same:
            self._replay = replay
        else:
            self._tell("its rows are others there")

    def _queue(self, pixels: UInt8[torch.Tensor, "B 3 H W"]) -> Outputs:
        return (self._encoder.queue(pixels),)

    def _tell(self, why: str) -> None:
        log(f"note: forward passes of {self._encoder.spec.model} are not recorded in a CUDA graph: {why}")
