"""Frozen reference models: images to pooled, L2-normalised features."""
