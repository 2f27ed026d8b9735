"""Work that a process of its own does and answers in JSON: a crash or a hang of it is an error of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ..errors import KTAMXError


def answer_of(module: str, argument: str, seconds: float | None = None) -> Any:
    """Run `python -m module argument`, and read the last line that it prints as JSON; libraries may print before.

    Args:
        module: Dotted name of a module that is a program.
        argument: Its one argument.
        seconds: The most to wait; None for as long as it takes.

    Raises:
        KTAMXError: It took longer, ended by a signal, or failed; with the last line of what it said of that.
    """
    command = [sys.executable, "-m", module, argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise KTAMXError(f"no answer within {seconds:.0f} s") from None
    if done.returncode < 0:
        raise KTAMXError(f"ended by signal {-done.returncode}: the CPU or the package does not fit")
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        pass
    raise KTAMXError(f"failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line of what a process wrote to stderr: the error itself, after a traceback."""
    return (text.strip().splitlines() or ["no message"])[-1]
