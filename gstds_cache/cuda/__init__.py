"""CUDA kernels: their texts, compiled when they are first asked for, and launched on torch's streams."""
