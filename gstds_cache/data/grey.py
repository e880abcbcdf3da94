"""Grey values of 16 and 32 bits and of floats as 8 bits: by a convention that is told or plain to see, or not.

Pillow clips ``I`` and ``F`` at 255; OpenCV and torchvision leave the values to the caller. None of them says that an
image came out black. Here, values mean

- 16-bit integers: 0..65535, the upper byte; or the full scale that a TIFF file declares (12 bits in 16);
- 32-bit integers: 0..255 where none is larger (what ``convert("I")`` makes of 8 bits), else 0..65535;
- floats: 0..1 where none is larger, else 0..255.

What does not fit is refused, with a reason that says what there is: more than a few values outside (-1..1, a million),
or all of many values in the lowest sixteenth, of which at most 16 would remain (12 bits in 16 that nobody
declared). A dark 16-bit image is as dark as that, and brightening it by a guess would make another image of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

OVERSHOOT = 0.05  # of the range: what resizing with a sharpening filter, or rounding, leaves beyond its ends
FEW = 0.01  # share of values outside of the range that are clipped: hot pixels
MANY = 32  # different values, of which half and more would become one


class UndecodableError(Exception):
    """An item that gives no image.

    Attributes:
        reason: Why, in one line that is the same in every run: no memory addresses, no absolute paths.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class GreyScale:
    """What a file says of its grey values.

    Attributes:
        ends: The values of black and white; None where the file does not tell.
        sixteen: Whether integers are known to be 0..65535.
    """

    ends: tuple[float, float] | None = None
    sixteen: bool = False

    def holds(self, low: float, high: float) -> bool:
        """Whether the ends are told, and values from ``low`` to ``high`` lie between them."""
        return self.ends is not None and self.ends[0] <= low and high <= self.ends[1]


def eight_bits(values: Shaped[np.ndarray, "H W"], scale: GreyScale) -> UInt8[np.ndarray, "H W"]:
    """Grey values as 8 bits.

    Args:
        values: Integers or floats. NaN is black.
        scale: What the file says of them.

    Returns:
        The same image.

    Raises:
        UndecodableError: The values follow no convention.
    """
    known = values[np.isfinite(values)].astype(np.float64) if values.dtype.kind == "f" else values.astype(np.int64)
    if not known.size:
        raise UndecodableError("no grey value: all are NaN or infinite")
    told = scale.ends if scale.holds(float(known.min()), float(known.max())) else None
    if values.dtype.kind != "f":
        return _integers(known, told, sixteen=scale.sixteen)
    top = 1.0 if _up_to_one(known) else 255.0
    margin = OVERSHOOT * top
    outside = float(np.mean((known < -margin) | (known > top + margin))) > FEW
    grey = _scaled(values, (0.0, top))
    if not outside and not _all_but_black(known, grey):
        return grey
    if told is not None:
        return _scaled(values, told)
    raise _no_range(known, "0 to 1 or 0 to 255") if outside else _black(known, grey, top)


def _up_to_one(values: Float64[np.ndarray, " n"]) -> bool:
    """Whether floats are meant to be 0..1: all of them are, or all but a few that are not 0..255 either."""
    high, most = float(values.max()), 1.0 + OVERSHOOT
    few = high <= 2.0 or high > 255.0 * most
    return high <= most or (few and float(np.mean(values > most)) <= FEW)


def _integers(
    values: Int64[np.ndarray, "H W"], told: tuple[float, float] | None, *, sixteen: bool
) -> UInt8[np.ndarray, "H W"]:
    outside = not sixteen and float(np.mean((values < 0) | (values > 65535))) > FEW
    if told is not None and (outside or told[1] < 65535):
        return _scaled(values, told)
    if outside:
        raise _no_range(values, "0 to 255 or 0 to 65535")
    if not sixteen and int(values.max()) <= 255:
        return np.asarray(np.clip(values, 0, 255), np.uint8)
    grey = np.asarray(np.clip(values, 0, 65535) >> 8, np.uint8)
    if _all_but_black(values, grey):
        raise _black(values, grey, 65535.0)
    return grey


def _scaled(values: Shaped[np.ndarray, "H W"], ends: tuple[float, float]) -> UInt8[np.ndarray, "H W"]:
    low, high = ends
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.asarray(np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0.0, 255.0)), np.uint8)


def _all_but_black(values: Shaped[np.ndarray, ...], grey: UInt8[np.ndarray, "H W"]) -> bool:
    """Whether many values are in the lowest sixteenth, and most of them gone; or several, and all of them black."""
    if int(grey.max()) > 15:
        return False
    before, after = len(np.unique(values)), len(np.unique(grey))
    return (before >= MANY and after <= before // 2) or (before > 1 and int(grey.max()) == 0)


def _black(values: Shaped[np.ndarray, ...], grey: UInt8[np.ndarray, "H W"], top: float) -> UndecodableError:
    return UndecodableError(
        f"all but black: grey values from {values.min():g} to {values.max():g} of 0 to {top:g}, {len(np.unique(grey))} "
        f"of {len(np.unique(values))} would remain; scale them to the full range, or declare theirs in SMaxSampleValue"
    )


def _no_range(values: Shaped[np.ndarray, ...], expected: str) -> UndecodableError:
    return UndecodableError(
        f"grey values in no known range: {values.min():g} to {values.max():g}, expected {expected}; scale them, or "
        "declare theirs in SMinSampleValue and SMaxSampleValue"
    )
