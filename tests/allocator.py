"""Settings of the C library for programs whose peak memory is measured."""

FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""Freed memory goes back to the system at once; else the peak depends on the allocator, by tens of MB."""
