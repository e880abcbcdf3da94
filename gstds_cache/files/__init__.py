"""Locations, atomic writes, locks, digests and memory-mapped arrays."""
