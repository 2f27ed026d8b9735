"""One run in an output folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from ..errors import KTAMXConfigError

LOCK = ".kt_hf.lock"


class OutputLock:
    """Keeps a second run out of an output folder. The operating system lets go of it when the process ends, however.

    Args:
        folder: The run's `output_dir`.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder to lock; nothing is locked before `take`."""
        self.folder = folder
        self._descriptor: int | None = None

    def take(self, create: bool = True) -> None:
        """Take the lock, if this object does not have it yet.

        Args:
            create: Make the folder if it is not there; without it, a folder that is not there is not locked.

        Raises:
            KTAMXConfigError: Another run has it.
            OSError: The folder cannot be made or written to.
        """
        if self._descriptor is not None or not (create or self.folder.is_dir()):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it before may have removed the file that was opened.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                    self._descriptor, descriptor = descriptor, -1
            except BlockingIOError:
                who = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
                raise KTAMXConfigError(
                    f"output_dir={str(self.folder)!r}: another run is writing there (process {who or 'unknown'}). Wait "
                    "until it is done, or give another folder."
                ) from None
            except OSError:  # a file system without locks
                self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def release(self) -> None:
        """Let go of the lock and remove its file; does nothing without it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
            os.close(self._descriptor)
            self._descriptor = None
