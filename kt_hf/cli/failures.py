"""Errors as a user of the command line sees them: a sentence and an exit code, a stack trace only if unforeseen."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..system.text import printable

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class Terminated(KeyboardInterrupt):
    """SIGTERM, which SLURM and the like send: it ends a verb as Ctrl-C does."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def plain_failures(*more: type[Exception]) -> Iterator[None]:
    """Turn KTAMXError, OSError, Ctrl-C, SIGTERM and `more` exceptions of the block into a message and an exit code.

    The message goes to stderr. The code is the exception's `exit_code` where it has one. Otherwise 2 for what the user
    can set right (a setting, a missing package, an unsupported model), 1 for a run that failed, 130 for Ctrl-C, 143 for
    SIGTERM.

    Args:
        more: Classes of exceptions besides those.

    Raises:
        typer.Exit: With that code, after the message.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals come to no other
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.SIGTERM: signal.signal(signal.SIGTERM, _terminated),
        }
    try:
        yield from _plainly(more)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminated(number: int, frame: Any) -> None:
    raise Terminated("Terminated.")


def _plainly(more: tuple[type[Exception], ...]) -> Iterator[None]:
    from ..errors import KTAMXBackwardError, KTAMXError, KTAMXForwardError

    foreseen: tuple[type[Exception], ...] = (KTAMXError, OSError, *more)
    try:
        yield
    except KeyboardInterrupt as stopped:
        _stop(str(stopped) or "Interrupted.", getattr(stopped, "exit_code", INTERRUPTED))
    except foreseen as error:
        failed = isinstance(error, (KTAMXForwardError, KTAMXBackwardError, OSError))
        _stop(str(error) or type(error).__name__, getattr(error, "exit_code", FAILED if failed else BAD_INPUT))


def _stop(message: str, code: int) -> None:
    typer.echo(f"kt-hf: {printable(message)}", err=True)
    raise typer.Exit(code)
