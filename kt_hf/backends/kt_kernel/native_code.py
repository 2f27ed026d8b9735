"""Keep what native code prints out of the user's stdout, and its destructors out of the process's end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import torch


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
        try:
            os.dup2(sink.fileno(), 1)
            yield
        finally:
            try:
                _flush_c()
            finally:  # an interruption must not leave the user without an output
                os.dup2(kept, 1)
                os.close(kept)
            sink.seek(0)
            for line in sink.read().decode(errors="replace").splitlines():
                if line.strip():
                    logger.debug("kt-kernel: %s", line)


@contextlib.contextmanager
def subnormals(flushed: bool | None = None) -> Iterator[None]:
    """Whatever happens inside, this thread takes subnormal numbers afterwards as it did before.

    Loading kt-kernel's libraries, which are linked with -ffast-math, has the thread that loads them, and those that it
    starts later, take subnormals for zero: PyTorch on the CPU would lose them in silence (weights with a scale of
    2^-127, for one).

    Args:
        flushed: Whether subnormals are zero inside, and in threads that are started there; None leaves it.
    """
    before = sys.float_info.min * 0.5 == 0.0
    if flushed is not None:
        torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flush_c() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def never_destroy(owner: Any) -> None:
    """Keep the objects of `owner.natives()` from being destroyed at the interpreter's end and in forks of this process.

    `owner.kept` becomes true then.

    kt-kernel's destructors print, and join their threads: after a fork those are not there and the child hangs; at exit
    the text would stand in the user's output. The system takes all of it back anyway.
    """
    _watch_the_end()
    _owners.add(owner)


_owners: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def _watch_the_end() -> None:
    atexit.register(_keep_natives)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_keep_natives)


def _keep_natives() -> None:
    for owner in list(_owners):
        owner.kept = True
        for native in owner.natives():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
