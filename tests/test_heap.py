"""What a process holds after it has freed much: all of it, unless the environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from pathlib import Path
from rlhf.heap import keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS"))

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resident()
blocks = [libc.malloc(1 << 20) for _ in range(64)]
for block in blocks:
    libc.memset(block, 1, 1 << 20)
full = resident()
for block in blocks:
    libc.free(block)
print(full - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees as it likes")
@pytest.mark.parametrize(("asked", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_blocks_stay_with_the_process_unless_the_environment_says_otherwise(
    asked: dict[str, str], kept: bool
) -> None:
    """64 blocks of 1 MiB: by itself glibc maps each apart, and gives it back at once. In kB."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | asked, capture_output=True, text=True, check=True
    )
    taken, left = map(int, done.stdout.split())
    assert taken >= 60 * 1024
    assert (left >= 60 * 1024) == kept and (left <= 8 * 1024) == (not kept)
