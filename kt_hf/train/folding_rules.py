"""Which gradient accumulation may be folded into larger batches: where the loss and the rows of a step stay.

A loss that is a sum over a step's tokens does not depend on how its rows are parted; a mean over pairs does not where
the parts are equally large. What is not known to be one of these is left as it is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .trial_step import RandomState

_DRAWN = 2_000  # rows for the estimate of padding, at least
# Losses of TRL that are sums over tokens; and means over pairs, each pair's a function of it alone.
_OVER_TOKENS = ("nll", "dft")
# Trainers of TRL whose batches are never changed.
_NEVER = {
    "KTOTrainer": "KTO's loss compares each row with the others of its batch",
    "GRPOTrainer": "GRPO's batches are the answers that the model writes to its prompts, and its loss is their mean",
    "ORPOTrainer": "ORPO's loss is a mean over the tokens of a batch",
}
_OVER_PAIRS = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """How the rows of an optimizer step are parted.

    Attributes:
        per_device_train_batch_size: Rows of a forward.
        gradient_accumulation_steps: Forwards of a step.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, args: Any) -> Split:
        """That of a trainer's arguments."""
        return cls(args.per_device_train_batch_size, args.gradient_accumulation_steps)

    def __str__(self) -> str:
        return f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps}"

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def folded(self, factor: int) -> Split:
        """The same rows in batches `factor` times as large; `factor` divides the number of batches."""
        return Split(self.per_device_train_batch_size * factor, self.gradient_accumulation_steps // factor)

    def factor_of(self, other: Split) -> int | None:
        """`other` is this one, folded so many times; None if it is not."""
        factor, rest = divmod(other.per_device_train_batch_size, self.per_device_train_batch_size)
        return factor if not rest and self.rows == other.rows else None


def record_of(args: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the split, for `recorded`."""
    return {"folding": asdict(Split.of(args))}


def recorded(record: dict[str, Any]) -> Split | None:
    """The split of the run that wrote a checkpoint's record; None if it does not say."""
    content = record.get("folding")
    if not isinstance(content, dict):
        return None
    numbers = [content.get(name) for name in Split.__dataclass_fields__]
    whole = [number for number in numbers if isinstance(number, int) and number > 0]
    return Split(*whole) if len(whole) == len(numbers) else None


def why_not(trainer: Any) -> str | None:
    """Why the loss of `trainer` depends on how the rows of a step are parted, or the run must not be changed; None if
    neither is so."""
    from trl import SFTTrainer

    args = trainer.args
    if getattr(trainer, "_is_vision_dataset", False):
        return "the rows have images, whose tokens are counted when their batch is made"
    if args.full_determinism:
        return "full_determinism leaves batches as they are written"
    if args.auto_find_batch_size:
        return "auto_find_batch_size changes batches by itself"
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        return "train_sampling_strategy=batch_rebalance parts the rows by itself"
    if type(trainer).__name__ in _NEVER:
        return _NEVER[type(trainer).__name__]
    if not (type(trainer) is SFTTrainer or over_pairs(trainer)) or trainer.compute_loss_func is not None:
        return "the loss is not TRL's own"
    if trainer.neftune_noise_alpha is not None:
        return "neftune_noise_alpha makes noise by the padded length of a batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return (
            f"the auxiliary loss of the routers (router_aux_loss_coef={trainer.router_aux_loss_coef}) is another one "
            "in larger batches; router_aux_loss_coef: 0 trains without it"
        )
    if over_pairs(trainer):
        other = [name for name in getattr(trainer, "loss_types", ()) if name not in _OVER_PAIRS]  # of DPO
        return f"loss_type={other[0]} looks at all pairs of a batch" if other else None
    if args.loss_type not in _OVER_TOKENS or not trainer.model_accepts_loss_kwargs:
        return f"loss_type={args.loss_type} is no sum over the tokens of a step"
    if args.world_size > 1 and not args.average_tokens_across_devices:
        return "average_tokens_across_devices=False weighs a token by how many others its process has in the step"
    if args.world_size > 1 and trainer.is_fsdp_enabled:
        return "FSDP shards what is not experts, and a trial would leave ranks waiting in its exchanges"
    if trainer.padding_free and "flash" not in str(trainer.model.config._attn_implementation):
        return "packed rows end to end take attention over the whole batch without flash attention"
    return None


def over_pairs(trainer: Any) -> bool:
    """Whether the loss of a batch is a mean over its pairs, and that of a step the mean of its batches': DPO's, and
    that of reward models."""
    from trl import DPOTrainer, RewardTrainer

    return type(trainer) in (DPOTrainer, RewardTrainer)


def whole_batches(args: Any, written: Split, factor: int, rows: int, pairs: bool, processes: int = 1) -> bool:
    """Whether an epoch's last step, which may have fewer rows, has the same rows and the same loss when it is folded.

    Where several processes part the rows, accelerate fills the last batches up with rows of the begin: it has to have
    none to fill.

    Args:
        args: The trainer's arguments.
        written: The split that the settings ask for.
        factor: To fold it by.
        rows: Of the training data.
        pairs: Whether the loss is a mean over each batch's rows, and the step's the mean of those: then its batches
            have to be equally large. A sum over tokens has the weights of the whole step.
        processes: That part the rows of a step among them, batch by batch.
    """
    batch = written.per_device_train_batch_size * processes
    larger = batch * factor
    if 0 < args.max_steps * written.rows * processes <= rows:
        return True  # no epoch ends
    if args.dataloader_drop_last:
        return rows % larger == rows % batch
    if processes > 1:
        return rows % larger == 0
    last = rows % written.rows
    return not pairs or all(last % size == 0 or last < size for size in (batch, larger))


def row_lengths(trainer: Any) -> np.ndarray:
    """Tokens of each training row as the model will see them, int64 [rows]; of a pair, the longer answer's."""
    import pyarrow.compute

    pairs = over_pairs(trainer)
    known = set(trainer.train_dataset.column_names)
    prompts = ("prompt_ids",) if "prompt_ids" in known else ()  # in a reward model's answers it is part of each
    columns = (*prompts, "chosen_ids", "rejected_ids") if pairs else ("input_ids",)
    table = trainer.train_dataset.select_columns(list(columns)).with_format("arrow")
    parts = []
    for rows in table.iter(batch_size=1000):
        sizes = [pyarrow.compute.list_value_length(rows[column]).to_numpy() for column in columns]
        parts.append(np.maximum(sizes[-1], sizes[-2]) + (sizes[0] if prompts else 0) if pairs else sizes[0])
    lengths = np.concatenate(parts).astype(np.int64)
    return np.minimum(lengths, trainer.args.max_length) if pairs and trainer.args.max_length else lengths


def draw_rows(trainer: Any) -> list[np.ndarray]:
    """Row numbers in the order in which epochs take them, by the run's sampler and seed; the random numbers stay."""
    rows = len(trainer.train_dataset)
    before = RandomState()
    torch.manual_seed(trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed)
    try:
        epochs = range(-(-_DRAWN // rows))
        return [np.fromiter(trainer._get_train_sampler(), np.int64) for _ in epochs]
    finally:
        before.put_back()


def padded_tokens(lengths: np.ndarray, orders: list[np.ndarray], batch: int, multiple: int = 1) -> int:
    """Tokens of the batches that rows of these lengths make, padding included.

    Args:
        lengths: [rows], tokens.
        orders: Of each epoch, the numbers of the rows.
        batch: Rows of a batch.
        multiple: Batches are padded to multiples of so many tokens (`pad_to_multiple_of`).
    """
    total = 0
    for order in orders:
        begins = np.arange(0, len(order), batch)
        longest = np.maximum.reduceat(lengths[order], begins)
        total += int((-(-longest // multiple) * multiple * np.diff(np.append(begins, len(order)))).sum())
    return total
