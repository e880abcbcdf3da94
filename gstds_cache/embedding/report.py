"""What one call of embedding did, and what its time went to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gstds_cache.embedding.estimate import Estimate
from gstds_cache.store.commit_record import Quarantined


@dataclass(frozen=True)
class EmbedReport:
    """What a call of embedding did.

    Attributes:
        location: The store, as a user names it.
        fingerprint: Its fingerprint.
        model: The reference model.
        items: Items in the data set; ``items == ok + len(quarantined)``.
        ok: Rows with an embedding.
        quarantined: Items that could not be decoded, with the reasons.
        embedded: Images put through the model by this call.
        reused: Rows taken over from other stores.
        committed_before: Rows that were committed already when this call began.
        shards: Shards of the store.
        batch_size: Images of every forward pass.
        workers: Processes that decoded.
        seconds: Time by phase, one after the other: hash, model, estimate (a batch that fits, the determinism check,
            the estimate), embed, finish, and total. Inside embed: waiting (for decoded images), forward and
            commit_wait in the main thread; beside them decode, summed over the workers, and commit, in a thread.
        shares: Of the time of embed, the share of decode (of all workers' time), forward, commit and waiting.
        notes: What the user should know.
        estimate: What was expected of this call, where it was long enough to ask.
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
