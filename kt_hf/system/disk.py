"""Space on the disk: looked at before something large is written, and named when it has run out."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import KTAMXDiskFullError, KTAMXError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The texts that libraries that write tensors turn those errors into: safetensors keeps the number, torch.save says
# where it stopped.
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122|27)\b|File too large|"
                        r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+")  # fmt: skip
_ROOM = 16 * 2**20  # bytes that a save writes besides tensors (configuration, trainer_state.json, random states)


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk that holds `path`, or will hold it."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def check_space(path: Path, needed: int, fix: str = "Free some, or write elsewhere") -> None:
    """Refuse to begin to write what would not fit on the disk.

    Args:
        path: File or folder to be written.
        needed: Its size in bytes.
        fix: What the user can do about it, a sentence without its full stop.

    Raises:
        KTAMXDiskFullError: The disk has fewer bytes free.
    """
    free = free_bytes(path)
    if needed + _ROOM > free:
        raise KTAMXDiskFullError(
            f"{path}: the disk has {size_of(free)} free, and {size_of(needed)} are to be written. {fix}."
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or a cause or context of it, says that a disk is full, a quota used up or a file too large."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or (number is None and _FULL_TEXT.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path, size: int | None = None) -> KTAMXDiskFullError:
    """The error to raise where writing `path` has filled the disk; `size` in bytes, if it is known."""
    of_size = f" of {size_of(size)}" if size is not None else ""
    return KTAMXDiskFullError(
        f"{path}{of_size} could not be written: the disk is full ({size_of(free_bytes(path.parent))} free), or a quota "
        "is used up. What was whole on it before is whole still."
    )


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn errors of a full disk in the block into one that names file, size and free space; other errors pass.

    Args:
        path: File or folder that the block writes.
        size: Its size in bytes; None if it is not known.

    Raises:
        KTAMXDiskFullError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KTAMXError) or not is_disk_full(error):
            raise
        raise disk_full(path, size) from error


def size_of(size: int) -> str:
    """Bytes in words: "1.5 GB", and exactly below a megabyte."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:,} bytes"
