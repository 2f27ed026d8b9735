"""Text that came from elsewhere, on a terminal."""

from __future__ import annotations

from kt_hf.system.text import printable


def test_what_terminals_obey_is_escaped_and_the_rest_is_kept() -> None:
    text = "a\x1b[31mb\x07\x9b\u202ec\r\n\td\ud800é😀"
    assert printable(text) == r"a\x1b[31mb\x07\x9b\u202ec\r" + "\n\td" + r"\ud800é😀"
