"""Gradient accumulation folded into larger batches, where experts' weights are streamed to a GPU.

Each micro-batch brings all weights of a streamed layer to the GPU once more: four of one row take three times as long
as one of four. So `per_device_train_batch_size` b x `gradient_accumulation_steps` a becomes b*f x a/f where nothing but
the time changes: the rows of a step stay the same in the same order, the loss is one that does not depend on how they
are parted (`folding_rules`), and little is computed for padding. A trial of the longest rows decides how large f is;
running out of memory later makes it smaller, from the last complete checkpoint on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..adapters import check_checkpoint
from ..adapters.whole import ranks_of
from ..errors import KTAMXError
from ..monitoring.accumulation import streams_experts
from ..placement import packer_of
from ..ranks import of_all_ranks
from .folding_rules import Split, draw_rows, over_pairs, padded_tokens, row_lengths, whole_batches, why_not
from .start_values import StartValues
from .stopping import checkpoint_of
from .together import meet_after, was_told
from .trial_step import Trial, forget_step, is_out_of_memory, try_step

_PADDING = 0.1  # of the tokens, that folding may add


def put_split(trainer: Any, split: Split) -> None:
    """Make the next `trainer.train` part the rows of a step as `split` says."""
    trainer.args.per_device_train_batch_size = split.per_device_train_batch_size
    trainer.args.gradient_accumulation_steps = split.gradient_accumulation_steps
    trainer._train_batch_size = trainer.args.train_batch_size


class _Again(Exception):
    """Leaves a `train` that has not begun its first step, to begin it with another split."""


class Folding(TrainerCallback):
    """Decides the split of a run, trains with it, and begins again with a smaller one when memory runs out.

    To be added to the trainer behind `KTMoECallback` and before callbacks that show anything.

    Args:
        trainer: TRL's, ready to train, with the split that the settings ask for.
        say: Takes a line to tell the user.
        new_optimizer: Gives the trainer a new optimizer and scheduler, or None for it to make them.

    Attributes:
        written: The split that the settings ask for.
        factor: How many times as large as written the batches are.
    """

    def __init__(self, trainer: Any, say: Callable[[str], None], new_optimizer: Callable[[], None]) -> None:
        self._trainer, self._say, self._new_optimizer = trainer, say, new_optimizer
        self.written, self.factor = Split.of(trainer.args), 1
        self._smaller: list[int] = []  # factors that may be taken where this one does not fit
        self._lengths = np.zeros(0, np.int64)
        self._padding = dict[int, float]()
        self._on_trial = False
        self._saved: list[Path] = []
        self._start: StartValues | None = None

    def decide(self, before: Split | None, resuming: bool) -> None:
        """Choose the split, and set it in the trainer; what is chosen for a new run is on trial until `train`.

        Args:
            before: The split of the checkpoint to go on from, if it says.
            resuming: Whether there is such a checkpoint.
        """
        kept = self.written.factor_of(before) if before else 1 if resuming else None
        # A checkpoint of another number of rows a step says nothing: it is as for a new run.
        if kept == 1 or self.written.gradient_accumulation_steps == 1:
            return
        if kept is None and not streams_experts(self._trainer.model):
            return
        reason = why_not(self._trainer)
        factors = [] if reason else self._allowed(kept)
        self._take(sorted(set.intersection(*map(set, self._of_all(factors))), reverse=True))
        self._on_trial = kept is None and self.factor > 1
        if not factors:
            self._say(
                f"gradient_accumulation_steps={self.written.gradient_accumulation_steps} is not folded into larger "
                f"batches, though streamed experts are copied to the GPU for each: {reason or self._no_factor()}."
            )
        elif kept is not None:
            was = "as" if self.factor == kept else f"not {before} as"
            self._say(f"{self.written} rows a step are computed as {self._split}, {was} in the checkpoint.")

    def _of_all(self, value: Any) -> list[Any]:
        """What each rank has; in a run of one process, its own."""
        return of_all_ranks(ranks_of(self._trainer.model), lambda: value)

    @property
    def _split(self) -> Split:
        return self.written.folded(self.factor)

    def _allowed(self, kept: int | None) -> list[int]:
        """Factors that leave the loss alone and do not add much padding, the largest first.

        Args:
            kept: The checkpoint's, whatever its padding; a larger one is not taken. None for a new run.
        """
        trainer, written, steps = self._trainer, self.written, self.written.gradient_accumulation_steps
        self._lengths = row_lengths(trainer)
        orders = [] if getattr(trainer, "padding_free", False) else draw_rows(trainer)
        multiple = trainer.args.pad_to_multiple_of or 1
        sizes = {
            f: padded_tokens(self._lengths, orders, written.per_device_train_batch_size * f, multiple)
            for f in range(steps, 0, -1)
            if steps % f == 0
        }
        self._padding = {f: size / sizes[1] - 1 if sizes[1] else 0.0 for f, size in sizes.items() if f > 1}
        pairs, rows = over_pairs(trainer), len(self._lengths)
        return [
            f
            for f, added in self._padding.items()
            if (kept is None or f <= kept)
            and (added < _PADDING or f == kept)
            and whole_batches(trainer.args, written, f, rows, pairs, trainer.args.world_size)
        ]

    def _no_factor(self) -> str:
        least = min(self._padding, key=lambda f: self._padding[f])
        if self._padding[least] >= _PADDING:
            return f"rows differ in length so much that padding would add {self._padding[least]:.0%} tokens"
        return f"the last step of an epoch of {len(self._lengths)} rows would have other rows, or another loss"

    def _take(self, factors: list[int]) -> None:
        """Go on with the first of these factors; without any, with the batches as they are written."""
        self.factor, *self._smaller = factors or [1]
        put_split(self._trainer, self._split)
        if (ranks := ranks_of(self._trainer.model)) is not None:
            ranks.patient = self.factor > 1  # one that runs out of memory goes on with smaller batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try the longest rows, once; keep what training starts from."""
        state.train_batch_size = args.train_batch_size  # a resumed state has that of the checkpoint
        if self._on_trial:
            self._on_trial = False
            self._try(kwargs["train_dataloader"])
        if self.factor > 1 and not state.global_step and self._start is None:
            self._start = StartValues.of(kwargs["model"], Path(args.output_dir))

    def _try(self, loader: Any) -> None:
        """Try the longest rows with smaller and smaller factors until they fit.

        Raises:
            _Again: Not with the one that training was to begin with.
        """
        longest = np.argsort(-self._lengths, kind="stable")
        before, trial, tried = self._split, Trial(False, ""), list[str]()
        while self.factor > 1 and not trial.fits:
            rows = longest[: self._split.per_device_train_batch_size].tolist()
            trial = try_step(self._trainer, loader, rows, self._split.gradient_accumulation_steps > 1)
            if not trial.fits:
                tried.append(f"{self._split} {trial.words}")
                self._take(self._smaller)
        self._say(self._decision(trial, tried))
        if self._split != before:
            raise _Again

    def _decision(self, trial: Trial, tried: list[str]) -> str:
        steps = self.written.gradient_accumulation_steps
        failed = f" On trial {'; '.join(tried)}." if tried else ""
        if self.factor == 1:
            return (
                f"gradient_accumulation_steps={steps} is not folded into larger batches: the GPU's memory is too "
                f"small.{failed}"
            )
        took = f"; the longest rows {trial.words}" if trial.words else ""
        times = self._split.gradient_accumulation_steps
        return (
            f"{self.written} rows a step are computed as {self._split}: streamed experts are copied to the GPU for "
            f"{times} forward{'s' if times > 1 else ''} a step, not for {steps}. The rows and the loss of a step stay "
            f"(padding {self._padding[self.factor]:+.1%} of tokens{took}).{failed}"
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the checkpoint, which a run that is short of memory can go on from."""
        if not args.save_only_model:  # without the optimizer's state it would be another run
            self._saved.append(checkpoint_of(args, state))
            self._start = None

    def train(self, resume: Path | None) -> None:
        """Train to the end.

        Args:
            resume: The checkpoint to go on from.

        Raises:
            torch.OutOfMemoryError: The GPU's memory is too small for the batches as they are written.
        """
        short = False
        while True:
            try:
                self._trainer.train(resume_from_checkpoint=str(resume) if resume else None)
                return
            except _Again:
                pass
            except Exception as error:
                several = self._trainer.args.world_size > 1
                if self.factor == 1 or not is_out_of_memory(error) or (several and not was_told(error)):
                    raise
                short = True
                meet_after(self._trainer.model, None)
                last, start = self._last(resume), self._start is not None
                every = self._of_all([str(last) if last else None, start])
                resume = Path(every[0][0]) if every[0][0] else None  # by rank 0, which writes them
                if resume is None and not all(one[1] for one in every) and self._trainer.state.global_step:
                    raise  # the disk had no room for what the run began with
            if short:  # out of the handler, whose error holds the batch in memory
                self._halve(resume)
                short = False
            self._forget()

    def _last(self, resume: Path | None) -> Path | None:
        """The last checkpoint that is complete: this run's, or the one it goes on from."""
        for folder in reversed(self._saved):
            try:
                check_checkpoint(folder)
            except KTAMXError:
                continue
            return folder
        return resume

    def _halve(self, resume: Path | None) -> None:
        before, step = self._split, self._trainer.state.global_step
        self._take([factor for factor in self._smaller if factor <= self.factor // 2])
        where = f"from {resume}" if resume else "from the start, for there is no complete checkpoint"
        self._say(
            f"The GPU ran out of memory after step {step}, in batches folded to {before}: the run goes on {where}, "
            f"with {self._split}."
        )
        if resume is None and self._start is not None:
            self._start.put_back(self._trainer.model)

    def _forget(self) -> None:
        """Let go what a `train` that did not end has left: gradients, the optimizer, layers on the GPU, sums to log."""
        trainer = self._trainer
        trainer.optimizer = trainer.lr_scheduler = None
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            trainer.model_wrapped = trainer.model  # DDP waits for the gradients that a backward did not come to
        trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
        trainer.accelerator.free_memory()
        for values in trainer._metrics.values():
            values.clear()
        trainer._total_train_tokens = 0  # as for a process that resumes
        packer = packer_of(trainer.model)
        if packer and packer.promotion:
            packer.promotion.release()
        forget_step(trainer.model)
        self._new_optimizer()
