"""What the images settle where the user left it open: the size that a model looks at, and how large JPEGs are decoded.

Both are part of a store's identity, as what they were settled to: a store made by ``auto`` is that of the size it took.
Where a store is there already, its own way is taken, so that the same command finds what an earlier one made; no image
is opened for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from gstds_cache.config import EmbedConfig
from gstds_cache.data.sizes import SampledSizes, sample_sizes
from gstds_cache.data.source import ImageSource
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import with_size
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.runtime.notify import Notify

SIDES = (96, 128, 160, 192)
"""Sides that ``size=auto`` takes, but for the model's own."""
ENLARGED = 4
"""How many times as long as the images' shorter side that of a model's square is. By what a linear probe loses, as the
smallest side is (docs/models.md): images of 32 pixels looked at in 128 cost 0.9 points, in 64 they cost 9."""
Decode = Literal["exact", "scaled"]
SIZE_BY = "size_by"
"""In a store's provenance: what settled the size."""


@dataclass(frozen=True)
class Settled:
    """The way that images are looked at.

    Attributes:
        config: The configuration, with nothing left open.
        looks_at: The size, and why it is that.
        by: What settled it: ``images``, ``store``, or '' where nothing was open.
    """

    config: EmbedConfig
    looks_at: str
    by: str


def side_for(shorter: int, own: int) -> int:
    """The side of the square a model looks at, for images whose shorter side is ``shorter`` pixels long.

    Args:
        shorter: In pixels; 0 where it is not known.
        own: The model's own side.

    Returns:
        The smallest of ``SIDES`` that is at least ``ENLARGED`` times as long; the model's own where that is no longer,
        or nothing is known.
    """
    return min((side for side in SIDES if ENLARGED * shorter <= side < own), default=own) if shorter else own


def take_code_as_stored(encoder: Encoder, stored: Mapping[str, Any], notify: Notify | None = None) -> None:
    """Take a model of a user's own for the one of a store that was made before such code was recorded.

    Args:
        encoder: The model, which is changed.
        stored: The store's specification of its encoder.
        notify: Told that it may be another.
    """
    spec = encoder.spec
    if spec.source and spec.model == stored.get("model") and "source" not in stored:
        encoder.of_unknown_code()
        if notify is not None:
            notify(
                f"note: the store was made before the code of {spec.model} was recorded, so whether that is the same "
                'today is not known: compare a sample of its rows with `verify_store(..., level="sample")`, or embed '
                "into a new store, which records it"
            )


def prepare_as_stored(encoder: Encoder, stored: Mapping[str, Any], notify: Notify | None = None) -> None:
    """Have images made ready as a store says, in what a model's name leaves open: the size, and how they are decoded.

    Args:
        encoder: The model, which is changed.
        stored: The store's specification of its encoder.
        notify: Told what is not known of a model of a user's own.
    """
    take_code_as_stored(encoder, stored, notify)
    theirs = stored.get("preprocessing", {})
    way = encoder.looking_at(theirs.get("crop", encoder.spec.preprocessing.crop)[0])
    decode, most = theirs.get("decode", "exact"), theirs.get("max_pixels", EmbedConfig.max_pixels)
    encoder.prepared_by(replace(way, decode=decode, max_pixels=most))


class Settling:
    """Settles for one call of embedding; images are opened only where no store tells."""

    def __init__(self, encoder: Encoder, config: EmbedConfig, source: ImageSource) -> None:
        """Take what is to be settled; until it is, images are made ready as before anything could be left open.

        Args:
            encoder: The model, which is changed.
            config: How it is embedded.
            source: The data set.
        """
        self._encoder, self._config, self._source = encoder, config, source
        self._own = replace(encoder.spec.preprocessing, max_pixels=config.max_pixels)
        encoder.prepared_by(self._own)

    def take_code(self, stored: Mapping[str, Any], notify: Notify | None) -> None:
        """:func:`take_code_as_stored` of the model."""
        take_code_as_stored(self._encoder, stored, notify)

    def ways(self) -> Iterator[Preprocessing]:
        """All that may come of what is left open, the one of stores made before anything could be left open first.

        Yields:
            Each.
        """
        sides = [side for side in SIDES if side < self._own.crop[0]] if self._encoder.sizes else []
        decodes: tuple[Decode, ...] = ("exact", "scaled") if self._decode_is_open else (self._decode(self._own),)
        for way in (self._own, *map(self._encoder.looking_at, sides)):
            for decode in decodes:
                yield replace(way, decode=decode)

    def as_stored(self, stored: Mapping[str, Any]) -> Settled | None:
        """Take the way of a store, where that differs from this model's in nothing but what is left open.

        Args:
            stored: The store's specification of its encoder.

        Returns:
            What was settled; None, with nothing changed, where the store is another model's, or one of another size.
        """
        theirs = stored.get("preprocessing", {})
        side, decode = theirs.get("crop", [0])[0], theirs.get("decode", "exact")
        if self._encoder.spec.model != stored.get("model") or not side:
            return None
        way = self._own if self._encoder.sizes is None else self._encoder.looking_at(side)
        if not self._decode_is_open:
            # What is named counts; only whether it scales anything may be open, which a store that scales tells.
            decode = decode if decode == self._config.decode else self._decode(way)
        way = replace(way, decode=decode)
        if way.to_dict() != theirs:
            return None
        left_open = self._encoder.sizes is not None or way.decode != "exact"
        return self._settled(way, "as the store does", "store") if left_open else self._settled(way, "", "")

    def by_images(self) -> Settled:
        """Look at the sizes of some images, and settle what is left open."""
        way, why = self._own, ""
        if self._encoder.sizes is not None:
            found = self._found
            side = side_for(found.median, self._own.crop[0])
            way = self._encoder.looking_at(side) if self._encoder.takes(side) else self._own
            why = f"the shorter side of {len(found.shorter)} sampled images is {found.median} in the median"
            why = why if found.shorter else "no image of a sample could be looked at"
        way = replace(way, decode=self._decode(way))
        return self._settled(way, why, "images" if why else "")

    @property
    def _decode_is_open(self) -> bool:
        return self._config.decode == "auto" and self._config.decoder == "pillow"

    @cached_property
    def _found(self) -> SampledSizes:
        return sample_sizes(self._source)

    def _decode(self, way: Preprocessing) -> Decode:
        """``scaled`` where that is not refused, and some sampled JPEG is decoded at half its size or less."""
        if self._config.decode == "exact" or self._config.decoder != "pillow":
            return "exact"
        side = replace(way, decode="scaled").scaled_side
        return "scaled" if any(shorter >= 2 * side for shorter in self._found.jpeg) else "exact"

    def _settled(self, way: Preprocessing, why: str, by: str) -> Settled:
        self._encoder.prepared_by(way)
        config, (height, width) = self._config, way.crop
        if self._encoder.sizes is not None:
            config = replace(config, model=with_size(config.model, None if way.crop == self._own.crop else height))
        if config.decoder == "pillow":
            config = replace(config, decode=way.decode)
        looks_at = f"{height} x {width} pixels" + (f": {why}" if why else "")
        if way.decode == "scaled":
            looks_at += "; large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size"
        return Settled(config, looks_at, by)
