"""Keep what native code prints on file descriptor 1 out of the user's stdout."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def native_output_to_log(logger: logging.Logger) -> Iterator[None]:
    """While inside, file descriptor 1 is a temporary file; what was written there is then logged at DEBUG.

    kt-kernel reports by C's printf. Python's own sys.stdout is flushed before, so its text is not caught. Where there
    is no descriptor 1 (a daemon, some notebooks), nothing is done.
    """
    try:
        sys.stdout.flush()
        _flush_c()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):
        yield
        return
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        try:
            yield
        finally:
            _flush_c()
            os.dup2(kept, 1)
            os.close(kept)
            sink.seek(0)
            for line in sink.read().decode(errors="replace").splitlines():
                if line.strip():
                    logger.debug("kt-kernel: %s", line)


def _flush_c() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


@functools.cache
def silence_native_exit() -> None:
    """Have what native code prints while the process ends go nowhere; what Python prints still arrives. Once a
    process."""
    atexit.register(_leave_stdout_to_python)


def _leave_stdout_to_python() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stdout.fileno() != 1:
            return
        sys.stdout.flush()
        _flush_c()
        own = os.dup(1)
        sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.close(sink)
