"""A disk that becomes full while a run writes: the Trainer's own files fail in words that do not name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..adapters.adapter import ADAPTER
from ..callback import checkpoint_bytes
from ..errors import KTAMXDiskFullError, KTAMXError
from ..system.disk import free_bytes, is_disk_full, size_of


@contextmanager
def full_disks(trainer: Any) -> Iterator[None]:
    """Turn what a library says of a full disk into a sentence with the file, the bytes wanted and free, and how to go
    on; other errors pass.

    Raises:
        KTAMXDiskFullError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KTAMXError) or not is_disk_full(error):  # the first is such a sentence
            raise
        output_dir = Path(trainer.args.output_dir)
        file = _written_last(output_dir, error)
        wanted = checkpoint_bytes(trainer.args, trainer.model, trainer.optimizer)
        raise KTAMXDiskFullError(
            f"{file} could not be written: the disk is full ({size_of(free_bytes(file.parent))} free, and a checkpoint "
            f"takes about {size_of(wanted)}), or a quota is used up. What was whole on it before is whole still: free "
            "some, and go on with resume_from_checkpoint=true."
        ) from error


def _written_last(output_dir: Path, error: Exception) -> Path:
    """The file that the error names, or the one in `output_dir` that was written to last: not all errors name one."""
    named = getattr(error, "filename", None)
    if isinstance(named, str):
        return Path(named)
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    last = max(files, key=lambda path: path.stat().st_mtime_ns, default=output_dir / ADAPTER)
    return last.parent / ADAPTER if isinstance(error, SafetensorError) else last  # which leaves no file
