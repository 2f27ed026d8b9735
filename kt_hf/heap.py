"""What the C library (glibc) does with freed memory."""

from __future__ import annotations

import ctypes
import functools
import logging
import os

logger = logging.getLogger(__name__)

# Of malloc.h. Pieces smaller than the first number of bytes are taken from the heap and go back to it; the heap's end
# goes back to the system when more than the second number is free there.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_PIECE, _END = 2**28, 2**30
_TUNED = ("mmap_threshold", "trim_threshold", "mmap_max", "top_pad")
_PIECE_OF_OLD = 2**25  # the most that glibc before 2.35 takes


def return_freed_memory() -> None:
    """Give freed heap back to the system, where the C library keeps it otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


@functools.cache
def keep_freed_memory() -> None:
    """From now on keep freed memory for what is allocated next, in pieces of up to 256 MiB.

    Else every large tensor of a step is made of new pages, which cost more than what is computed with them: of a
    DeepSeek-V2-Lite layer with 2,048 tokens on two cores, 220,000 pages and a seventh of the time. Weights of whole
    layers are larger, and given back as ever. Left alone where the environment tunes malloc.
    """
    if any(f"MALLOC_{name}_".upper() in os.environ or name in os.environ.get("GLIBC_TUNABLES", "") for name in _TUNED):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    if mallopt(_M_MMAP_THRESHOLD, _PIECE) or mallopt(_M_MMAP_THRESHOLD, _PIECE_OF_OLD):
        mallopt(_M_TRIM_THRESHOLD, _END)
        logger.debug("kt_hf: freed memory is kept for the next tensors.")
