"""Benchmarks, and the study: figures, each with how it was measured."""
