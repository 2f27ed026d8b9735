"""Text of unknown origin made safe to print."""

from __future__ import annotations

import re

# C0 and C1 control characters but newline and tab, lone surrogates, line separators, and marks that change the
# direction of writing: with them a text moves the cursor, changes colours, or looks like another one.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with everything that a terminal would obey written as an escape, such as `\x1b`."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
