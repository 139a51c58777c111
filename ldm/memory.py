"""The allocator of the C library, for command lines; nothing here happens on import."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # parameters of mallopt(3), as in malloc.h
TOP_PAD = 64 * 2**20  # bytes asked of the system beyond the need, whenever the heap grows


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor, for the whole process; return whether it does.

    By default it gives every large tensor back to the system at once, and the next one is mapped and cleared anew,
    page by page. Other C libraries are left alone. Works best before the first tensor is made.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}  # -1: never
    return all(mallopt(name, value) == 1 for name, value in settings.items())
