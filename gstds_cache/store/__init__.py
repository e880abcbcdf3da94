"""The cache on disk, format 2 (docs/cache-format.md)."""
