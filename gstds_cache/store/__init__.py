"""The cache on disk, format 1 (docs/cache-format.md)."""
