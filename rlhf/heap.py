"""Freed memory stays with the process, for the next pass to take.

A training pass takes the same tens or hundreds of megabytes as the one before. glibc gives the end of its heap back to
the system whenever much of it is free, so that every pass would be handed fresh pages, which the kernel has to clear.
The high-water mark is the same; what is not given back between two passes is what they would have taken again.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT = 2**31 - 1  # bytes that may lie free at the heap's end: the most that mallopt takes
OWN_MAPPING = 32 << 20  # bytes from which a block is no part of the heap: the most that glibc allows on 64 bits


def keep_freed_memory() -> None:
    """Do so from now on in this process. Nothing where the C library is another one, or where the environment has its
    own wishes (MALLOC_*, GLIBC_TUNABLES)."""
    asked = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not asked:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
        mallopt(M_TRIM_THRESHOLD, KEPT)
