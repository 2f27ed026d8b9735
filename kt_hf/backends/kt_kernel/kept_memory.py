"""Memory that stays until the process ends: kt-kernel never frees the packed forward weights of a layer."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


class KeptMemory:
    """Bytes of packed forward weights of every layer built in this process, of deleted models too."""

    def __init__(self) -> None:
        self.packed = 0
        self._warned = False
        self._pid = 0

    def add(self, size: int) -> None:
        """Count a layer whose weights have been packed, `size` in bytes."""
        self.packed += size
        self._pid = os.getpid()

    def warn_before_another_model(self) -> None:
        """Say what stays of the models before, once a process: a search over settings packs one model a trial."""
        if self.packed and not self._warned and self._pid == os.getpid():  # a fork has its parent's count
            self._warned = True
            logger.warning(
                "kt_hf: another model is patched in this process. %.2f GiB of packed experts of those before stay in "
                "memory until the process ends, for kt-kernel does not free them, and as much is added for each model. "
                "Start a process for each (a trial of a hyperparameter search), or take kt_backend='torch'.",
                self.packed / 2**30,
            )  # fmt: skip


KEPT = KeptMemory()
"""What packed layers of deleted models have left in this process's memory, which kt-kernel does not free."""
