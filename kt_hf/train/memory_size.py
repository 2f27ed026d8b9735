"""Sizes of memory as people write them: 512GB, 24 GiB, 1.5TB."""

from __future__ import annotations

import math
import re

from ..errors import KTAMXConfigError

_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(?:i?B)?\s*", re.IGNORECASE)


def bytes_of(text: str, option: str) -> int:
    """Bytes of a size such as 512GB. GB and GiB are both 2**30 bytes, as memory is sold.

    Args:
        text: A number and one of M, G, T, MB, MiB, GB, GiB, TB, TiB.
        option: What the size was given for, to be named in the error.

    Raises:
        KTAMXConfigError: No such size, or none above 0.
    """
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not math.isfinite(size) or not 1 <= size < 2**60:
        raise KTAMXConfigError(f"{option}={text!r} is no size of memory: write 512GB, or 1.5TB.")
    return int(size)
