"""kt-kernel's worker pools: one set in a process, alive as long as a layer is, and never used in a fork."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from typing import Any

from ...errors import KTAMXNotAvailableError
from ...system.cpu import ThreadPlan, plan_threads
from .idle_workers import IdleWorkers
from .native_code import native_output_to_log, never_destroy, subnormals

logger = logging.getLogger(__name__)


class Cache:
    """What the operators keep for backward: one forward a layer, or one for all layers that share the pool."""

    def __init__(self) -> None:
        self.holds = 0  # generation of the saved forward, 0 for none
        self.generations = itertools.count(1)


def pool_config(plan: ThreadPlan) -> Any:
    """kt-kernel's `WorkerPoolConfig` for a plan: threads and memory of pool i are bound to the i-th NUMA node of it."""
    from kt_kernel import kt_kernel_ext

    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count = len(plan.pools)
    config.subpool_numa_map = [node for node, _ in plan.pools]
    config.subpool_thread_count = [threads for _, threads in plan.pools]
    return config


class Engine:
    """kt-kernel's worker pools: one `Engine` at a time in a process, alive as long as any layer that uses it.

    Args:
        plan: Number of pools, their NUMA nodes and threads.
    """

    _current: weakref.ref[Engine] | None = None

    def __init__(self, plan: ThreadPlan) -> None:
        self.plan = plan
        self.pid = os.getpid()
        self.shared_cache = Cache()
        self.workers = IdleWorkers()
        # Upper bound of PyTorch's threads while the workers share one core between calls.
        self.torch_threads = plan_threads(tp_enabled=False).workers
        # The workers are slow at subnormals, and AMX and AVX512-BF16 have none.
        with native_output_to_log(logger), subnormals(flushed=True):
            from kt_kernel import kt_kernel_ext

            self.cpu_infer = kt_kernel_ext.CPUInfer(pool_config(plan))
        never_destroy(self)

    kept = False  # becomes true at the interpreter's end and in a fork: `never_destroy`

    def natives(self) -> list[Any]:
        """kt-kernel's objects that must not be destroyed at the interpreter's end: see `never_destroy`."""
        return [self.cpu_infer]

    def __del__(self) -> None:
        if self.kept:
            return  # at the interpreter's end even the imports below are gone
        try:
            self.workers.end()
            with native_output_to_log(logger):
                self.cpu_infer = None
        except Exception:
            pass

    @classmethod
    def get(cls, plan: ThreadPlan) -> Engine:
        """The process's worker pools, made by `plan` if there are none yet; another plan than theirs is a warning.

        Raises:
            KTAMXNotAvailableError: The process is a fork of the one whose pools they are.
        """
        engine = cls._current() if cls._current else None
        if engine is not None and engine.pid != os.getpid():
            raise KTAMXNotAvailableError(
                "kt-kernel's operators: this process is a fork of one that has a patched model, and the operators' "
                "threads did not come along. Start it by spawn (multiprocessing.get_context('spawn')), or patch only "
                "after the fork."
            )
        if engine is None:
            engine = cls(plan)
            cls._current = weakref.ref(engine)
        elif engine.plan != plan:
            logger.warning("Another patched model of this process runs on %s: this one uses the same.", engine.plan)
        return engine
