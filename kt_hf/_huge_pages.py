"""Pages of 2 MB for PyTorch's large tensors on the CPU.

Linux's kernel gives them to who asks (`madvise`, what Ubuntu comes with) or to everybody (`always`: Debian, RHEL). With
pages of 4 KB a training step without a GPU spends a fifth of its time on new ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by PyTorch once, before its first tensor on the CPU.
VARIABLE = "THP_MEM_ALLOC_ENABLE"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_huge_pages() -> None:
    """Have PyTorch ask where the system gives them for the asking, unless it is loaded already or the variable is set.

    The environment of this process, and of those it starts, has the variable then.
    """
    if "torch" not in sys.modules and huge_pages() == "madvise":
        os.environ.setdefault(VARIABLE, "1")


def huge_pages(mode: Path = _MODE) -> str:
    """To whom the system gives them: always, madvise or never; or unknown."""
    try:
        return mode.read_text().split("[", 1)[1].split("]", 1)[0]
    except (OSError, IndexError):
        return "unknown"
