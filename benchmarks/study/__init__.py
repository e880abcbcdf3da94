"""The study: does selection pay? Data sets, runs, tables (benchmarks/study/README.md)."""
