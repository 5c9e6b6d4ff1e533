"""Memory and objects of a long loop: what it frees and takes again is kept, and what was there before is left alone."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 65_536  # what glibc moves to by itself in a busy process, and its default


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block freed memory stays with the process instead of going back to the system; after it, it goes back.

    glibc gives large blocks back to the system when they are freed, so that each training step gets its pages anew,
    zeroed one by one by the kernel: 15 of the 146 ms of a small GPT's step on one core, 30 of a small WaveNet's 370 ms.
    With another C library than glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.malloc_trim(0)


@contextmanager
def settled_objects() -> Iterator[None]:
    """Inside the block the search for garbage leaves out the objects that are there now. PyTorch and numba bring so
    many that looking at all of them, again and again, took a twentieth of a small GPT's training."""
    gc.collect()  # what is garbage now would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
