"""Devices, threads, memory and compiled code of this process."""
