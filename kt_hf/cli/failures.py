"""What a user sees when a verb fails: a sentence and an exit code, a stack trace only for what nobody foresaw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..system.text import printable

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


@contextmanager
def plain_failures(*own: type[Exception]) -> Iterator[None]:
    """Turn KTAMXError, OSError, Ctrl-C and the verb's `own` exceptions into a message on stderr and an exit code.

    The code is the exception's `exit_code` where it has one. Otherwise 2 for what the user can set right (a setting, a
    missing package, an unsupported model), 1 for a run that failed, 130 for Ctrl-C.
    """
    from ..errors import KTAMXBackwardError, KTAMXError, KTAMXForwardError

    foreseen: tuple[type[Exception], ...] = (KTAMXError, OSError, *own)
    try:
        yield
    except KeyboardInterrupt:
        _stop("Interrupted.", INTERRUPTED)
    except foreseen as error:
        failed = isinstance(error, (KTAMXForwardError, KTAMXBackwardError, OSError))
        _stop(str(error) or type(error).__name__, getattr(error, "exit_code", FAILED if failed else BAD_INPUT))


def _stop(message: str, code: int) -> None:
    typer.echo(f"kt-hf: {printable(message)}", err=True)
    raise typer.Exit(code)
