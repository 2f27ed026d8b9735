"""`kt-hf`, and `python -m kt_hf`: the command line, which can be stopped without a traceback from its start."""

from __future__ import annotations

import signal
from typing import Any


def main() -> None:
    """Run the command `kt-hf`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)  # until the verb takes signals itself: its libraries take seconds to import
    from .cli import app

    app(prog_name="kt-hf")


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
