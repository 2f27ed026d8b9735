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
from .native_code import native_output_to_log, never_destroy

logger = logging.getLogger(__name__)


class Cache:
    """What the operators keep for backward: one forward a layer, or one for all layers that share the pool."""

    def __init__(self) -> None:
        self.holds = 0  # generation of the saved forward, 0 for none
        self.generations = itertools.count(1)


def pool_config(plan: ThreadPlan) -> Any:
    """A plan as kt-kernel wants it: threads and memory of pool i are bound to the i-th node of the map."""
    from kt_kernel import kt_kernel_ext

    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count = len(plan.pools)
    config.subpool_numa_map = [node for node, _ in plan.pools]
    config.subpool_thread_count = [threads for _, threads in plan.pools]
    return config


class Engine:
    """kt-kernel's worker pools. One at a time in a process, alive as long as a layer is."""

    _current: weakref.ref[Engine] | None = None

    def __init__(self, plan: ThreadPlan) -> None:
        from kt_kernel import kt_kernel_ext

        self.plan = plan
        self.pid = os.getpid()
        self.shared_cache = Cache()
        self.workers = IdleWorkers()
        # The most of PyTorch's threads where these have the cores between calls: the workers are on one of them then.
        self.torch_threads = plan_threads(tp_enabled=False).workers
        with native_output_to_log(logger):
            self.cpu_infer = kt_kernel_ext.CPUInfer(pool_config(plan))
        never_destroy(self)

    kept = False  # destroyed by nobody any more: the interpreter ends, or this is a fork

    def natives(self) -> list[Any]:
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
