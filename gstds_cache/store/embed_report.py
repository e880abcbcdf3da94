"""What embedding was expected to take, and what one call did.

In ``store``, as :class:`~gstds_cache.store.reader.EmbeddingStore` carries the report of the call that returned it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gstds_cache.store.commit_record import Quarantined


@dataclass(frozen=True)
class Estimate:
    """What embedding the rest of a data set will need.

    Attributes:
        items: Items of the data set.
        committed: Rows that the store has already.
        images: Images that are left.
        batch_size: Images per forward pass; it fits the device.
        workers: Processes that decode.
        device: Kind of device.
        decode_per_second: Images one process reads and decodes in a second; or the device, where that decodes.
        forward_per_second: Images the model takes in a second, by itself.
        images_per_second: What both make together.
        seconds: Time for the images that are left.
        disk_bytes: What will be written.
        disk_free: Bytes free where it will be written, or None where nobody knows.
        ram_bytes: Memory of the main process with all it holds at once.
        ram_free: Memory it can have, or None where nobody knows.
        vram_bytes: Memory on the GPU, or None without one.
        vram_free: Memory it can have there.
        decoder: What decodes.
        looks_at: The size of the pictures that the model looks at, and why, in words.
    """

    items: int
    committed: int
    images: int
    batch_size: int
    workers: int
    device: str
    decode_per_second: float
    forward_per_second: float
    images_per_second: float
    seconds: float
    disk_bytes: int
    disk_free: int | None
    ram_bytes: int
    ram_free: int | None
    vram_bytes: int | None
    vram_free: int | None
    decoder: str = "pillow"
    looks_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """The estimate for people, in two lines to four."""
        minutes, seconds = divmod(round(self.seconds), 60)
        done = f" ({self.committed:,} of {self.items:,} are committed)" if self.committed else ""
        needs = [("disk", self.disk_bytes, self.disk_free), ("memory", self.ram_bytes, self.ram_free)]
        if self.vram_bytes is not None:
            needs.append(("GPU memory", self.vram_bytes, self.vram_free))
        texts = [
            f"{name} {size_text(need)}" + (f" of {size_text(free)} free" if free is not None else "")
            for name, need, free in needs
        ]
        where = f"in each of {max(self.workers, 1)}" if self.decoder == "pillow" else f"with {self.decoder}"
        short = [name for name, need, free in needs if free is not None and need > free]
        return [
            f"estimate: {self.images:,} images{done} at about {self.images_per_second:,.0f}/s take "
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} (decoding {self.decode_per_second:,.0f}/s {where}, "
            f"the model {self.forward_per_second:,.0f}/s at batch size {self.batch_size})",
            f"needs: {', '.join(texts)}",
            *([f"looks at: {self.looks_at}"] if self.looks_at else []),
            *([f"warning: not enough {' and '.join(short)}"] if short else []),
        ]


@dataclass(frozen=True)
class EmbedReport:
    """What a call of embedding did.

    Attributes:
        location: The store, as a user names it.
        fingerprint: Its fingerprint.
        model: The reference model.
        items: Items in the data set; ``items == ok + len(quarantined)`` of a store that is complete.
        ok: Rows with an embedding; of a store that is not complete, those of this call's part.
        quarantined: Items that could not be decoded, with the reasons; of the same rows.
        embedded: Images put through the model by this call.
        reused: Rows taken over from other stores.
        committed_before: Rows, of those that this call was to embed, that were committed already when it began.
        shards: Shards of the store.
        batch_size: Images of every forward pass.
        workers: Processes that decoded.
        seconds: Time by phase, one after the other: hash, model, estimate (a batch that fits, the determinism check,
            the estimate), embed, finish, and total. Inside embed: waiting (for decoded images), forward and
            commit_wait in the main thread; beside them decode, summed over the workers, and commit, in a thread.
        shares: Of the time of embed, the share of decode (of all workers' time), forward, commit and waiting.
        notes: What the user should know.
        estimate: What was expected of this call, where it was long enough to ask.
        looks_at: The size of the pictures that the model looks at, and why, in words.
        shard: Which part of the store's shards this call was to embed, as ``I/N``; None for all.
        part_shards: How many shards these are.
        shards_left: Shards of the store that were not committed when this call ended: other parts'.
        complete: Whether the store was complete when this call ended. With no shard left and this false, another
            process was finishing it.
    """

    location: str
    fingerprint: str
    model: str
    items: int
    ok: int
    quarantined: tuple[Quarantined, ...]
    embedded: int
    reused: int
    committed_before: int
    shards: int
    batch_size: int
    workers: int
    seconds: dict[str, float]
    shares: dict[str, float]
    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None
    looks_at: str = ""
    shard: str | None = None
    part_shards: int = 0
    shards_left: int = 0
    complete: bool = True

    @property
    def cache_hit(self) -> bool:
        """Whether everything was there already."""
        return self.committed_before == self.items

    @property
    def images_per_second(self) -> float:
        """Images embedded over the time from the start of the decoders to the last commit; 0 for a cache hit."""
        return self.embedded / self.seconds["embed"] if self.embedded else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them, as JSON-able values."""
        return {
            **{name: value for name, value in vars(self).items() if name != "location"},
            "store": self.location,
            "quarantined": [vars(item) for item in self.quarantined],
            "cache_hit": self.cache_hit,
            "images_per_second": round(self.images_per_second, 2),
            "estimate": self.estimate.to_dict() if self.estimate else None,
        }


def size_text(count: int) -> str:
    """A number of bytes in the unit that fits it."""
    if count < 1000:
        return f"{count} B"
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    for unit in units:
        size /= 1000
        if size < 1000 or unit == units[-1]:
            break
    return f"{size:.0f} {unit}" if size >= 100 else f"{size:.1f} {unit}"
