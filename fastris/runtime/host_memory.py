"""Freed memory that stays with the process: what makes a training step on a CPU wait less for the kernel.

glibc hands every large block back to the kernel when it is freed, and asks for it anew a moment later. Fresh pages are
mapped and zeroed one by one when they are first touched, 4 KiB each: for the 44 MB gradient of the projector's widest
map that takes ten times longer than computing it. PyTorch caches memory on GPUs for the same reason; on a CPU it asks
the system's allocator each time.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed for the next request, in this process, from now on.

    Values do not change; the process keeps the memory of its largest moment until it ends. For processes that train or
    predict on a CPU: the commands of fastris do it, a script of your own calls it once, before the first step.

    Returns whether the allocator could be told; False without glibc, where nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, LARGEST_INT)])
