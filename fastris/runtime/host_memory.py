"""Make glibc keep freed memory in the process, which spares a training step on a CPU many page faults.

By default glibc returns every large block to the operating system's kernel when it is freed, and requests it again a
moment later. New pages are mapped and zeroed one by one, 4 KiB each, when they are first touched: for the 44 MB
gradient of the projector's widest map that takes ten times longer than computing it. PyTorch caches memory on GPUs for
the same reason; on a CPU it calls the system's allocator each time.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set glibc's allocator to keep freed memory for later requests, in this process, from now on.

    Results do not change; the process keeps its peak memory until it ends. For processes that train or predict on a
    CPU: the commands of fastris call it, a script of your own should do so once, before the first step.

    Returns whether the setting was made; False without glibc, where nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, LARGEST_INT)])
