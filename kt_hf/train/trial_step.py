"""A training step on trial: forward and backward of some rows, of which nothing is left but the knowledge if it fits.

The trainer's own `training_step` computes it, within a run that has begun: with the loss, the collator, the precision
and the checkpointing of the run. No optimizer steps, and what the step changed elsewhere is put back: gradients, random
numbers, what was counted.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ..adapters.whole import ranks_of
from ..backends import CALL_LOCK
from ..backends.buffer_pool import BUFFER_POOL
from ..errors import KTAMXError
from ..experts.layer import kt_layers
from ..ranks import of_all_ranks
from ..system.memory import free_device_memory
from .together import meet_after, was_told

_ROOM = 0.05  # of the memory that PyTorch may take, to be left free: batches of other lengths do not fit as snugly
_GB = 1e9
_GATHERS = "gather", "gather_for_metrics"


@dataclass(frozen=True)
class Trial:
    """What came of a step on trial.

    Attributes:
        fits: Whether it had memory enough, and left room.
        words: What it took, to be told; "" where there is no GPU to ask.
    """

    fits: bool
    words: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had no memory left, in the words of PyTorch or of the libraries that it calls; perhaps of another
    rank, which has told this one."""
    if isinstance(error, KTAMXError):
        return was_told(error) and ("OutOfMemoryError: " in str(error) or "STATUS_ALLOC_FAILED" in str(error))
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "STATUS_ALLOC_FAILED" in str(error)
    )


def try_step(trainer: Any, loader: Any, rows: Sequence[int], accumulates: bool) -> Trial:
    """Compute a step's forward and backward, see whether it fits on the GPU, and put everything back.

    Args:
        trainer: One whose `train` has called `on_train_begin`.
        loader: Its data loader for training.
        rows: Indices into the loader's data set that make the batch.
        accumulates: Whether the run's steps have several such batches, so that gradients are there beside them.

    Returns:
        Whether it fits, on all ranks. On the CPU it does unless something raised `torch.OutOfMemoryError`.
    """
    device, failed, failure = trainer.args.device, False, None
    with _put_back(trainer), _by_itself(trainer):
        free, allocated = free_device_memory(device), _begin_peak(device)
        try:
            batch = loader.collate_fn([loader.dataset[row] for row in rows])
            samples, items = trainer.get_batch_samples(iter([batch]), 1, device)
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model_wrapped, samples[0], items)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
            if not isinstance(error, KTAMXError):  # a copy of it, which holds no batch in memory
                failure = torch.OutOfMemoryError(str(error))
        meet_after(trainer.model, failure)
        if failed:
            trial = Trial(False, "ran out of memory")
        elif device.type != "cuda":
            trial = Trial(True, "")
        else:
            torch.cuda.synchronize(device)
            trial = _measured(trainer, accumulates, free, allocated)
        return _of_all(trainer.model, trial)


def _measured(trainer: Any, accumulates: bool, free: int, allocated: int) -> Trial:
    """Whether a step whose peak the allocator knows leaves room."""
    taken = torch.cuda.max_memory_allocated(trainer.args.device) - allocated + _later(trainer, accumulates)
    fits, most = leaves_room(taken, free, allocated), free + allocated
    return Trial(fits, f"{'took' if fits else 'would take'} {(allocated + taken) / _GB:.1f} of {most / _GB:.1f} GB")


def _of_all(model: Any, trial: Trial) -> Trial:
    """What came of it on all ranks: it fits where it fits on all, and is told of the first on which it does not."""
    every = [Trial(**one) for one in of_all_ranks(ranks_of(model), lambda: vars(trial))]
    return next((one for one in every if not one.fits), every[0])


@contextmanager
def _by_itself(trainer: Any) -> Iterator[None]:
    """While this is open ranks meet in the experts' layers alone, where one that fails can tell the others.

    They would wait for it in DDP's exchange of gradients, and where TRL's trainers gather what they log.
    """
    wrapped, accelerator = trainer.model_wrapped, trainer.accelerator
    if not isinstance(wrapped, DistributedDataParallel):
        yield
        return
    with wrapped.no_sync():
        for name in _GATHERS:
            setattr(accelerator, name, lambda values, *_, **__: values)
        try:
            yield
        finally:
            for name in _GATHERS:
                delattr(accelerator, name)


def leaves_room(taken: int, free: int, allocated: int) -> bool:
    """Whether a step that takes `taken` bytes leaves room in a memory of `allocated` + `free` bytes."""
    return taken <= free - _ROOM * (free + allocated)


def _begin_peak(device: torch.device) -> int:
    """Bytes allocated now, from which the peak is watched."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _later(trainer: Any, accumulates: bool) -> int:
    """Bytes that a step will find on the GPU and the trial did not: Adam's moments; gradients of batches before."""
    on_gpu = [p for p in trainer.model.parameters() if p.requires_grad and p.is_cuda]
    state = getattr(trainer.optimizer, "state", None)
    return sum(p.nbytes for p in on_gpu) * ((0 if state else 2) + accumulates)


@contextmanager
def _put_back(trainer: Any) -> Iterator[None]:
    """Undo what a forward and backward inside of it change: nothing of it is in memory, counted or logged after."""
    numbers = RandomState()
    counted = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTED if name in vars(trainer)}
    layers = kt_layers(trainer.model)
    try:
        yield
    finally:
        vars(trainer).update(counted)
        forget_step(trainer.model)
        for layer in layers:
            layer.take_load()
        numbers.put_back()


# Of TRL's trainers: what they log of the batches since the last log, and tokens in all.
_COUNTED = ("_metrics", "_total_train_tokens")


def forget_step(model: Any) -> None:
    """Let go what a forward and backward left in memory, ended or not: gradients, saved tensors, buffers."""
    model.zero_grad()
    for layer in kt_layers(model):
        layer.forget_recompute()
    gc.collect()
    with CALL_LOCK:
        BUFFER_POOL.release()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class RandomState:
    """The random numbers of Python, NumPy and PyTorch, of all its devices, as they are when it is made."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if cuda else []

    def put_back(self) -> None:
        """Draw from here on what was to be drawn then."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
