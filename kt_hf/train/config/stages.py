"""The stages of training: which of TRL's trainers each is, which rows it takes, and what follows for a run."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

from ...errors import KTAMXConfigError


@dataclass(frozen=True)
class Stage:
    """A stage, as `stage: NAME` asks for it.

    Attributes:
        name: In a configuration.
        module: Of TRL, where its trainer and configuration are.
        trainer: The trainer's class.
        config: The class of its arguments.
        words: What it trains, in words.
        pairs: Whether a row is a preferred and a rejected answer, both of which a forward computes.
        tokenized: Whether the trainer is given token ids; else rows, which it tokenizes itself.
        reference: Whether the loss has a reference policy, whose log probabilities can be computed beforehand.
        scores: Whether the model has a score head in the place of the language model's.
        generates: Whether the model writes the answers, which reward functions judge.
        chunked: Whether the loss takes no full logits.
    """

    name: str
    module: str
    trainer: str
    config: str
    words: str
    pairs: bool = False
    tokenized: bool = False
    reference: bool = False
    scores: bool = False
    generates: bool = False
    chunked: bool = True

    def trainer_class(self) -> Any:
        """TRL's trainer. Raises `KTAMXConfigError` where it cannot be imported."""
        return self._of_trl(self.trainer)

    def config_class(self) -> Any:
        """The class of the trainer's arguments. Raises `KTAMXConfigError` where it cannot be imported."""
        return self._of_trl(self.config)

    def _of_trl(self, name: str) -> Any:
        try:
            with warnings.catch_warnings():
                # It may change with any release: those that were tried are pinned. A misspelled key asks all stages.
                warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
                return getattr(importlib.import_module(self.module), name)
        except (ImportError, AttributeError) as error:
            raise KTAMXConfigError(
                f"Training needs TRL, which cannot be imported ({error}). Install with: pip install 'kt-hf[train]'"
            ) from None


_ALL = (
    Stage("pt", "trl", "SFTTrainer", "SFTConfig", "plain text, packed", tokenized=True),
    Stage("sft", "trl", "SFTTrainer", "SFTConfig", "answers of conversations", tokenized=True),
    Stage("dpo", "trl", "DPOTrainer", "DPOConfig", "preference pairs", pairs=True, reference=True),
    Stage("kto", "trl", "KTOTrainer", "KTOConfig", "answers marked as good or bad", reference=True),
    # Of TRL's experimental part: it may change with any release, `_versions.py` pins those that were tried.
    Stage(
        "orpo", "trl.experimental.orpo", "ORPOTrainer", "ORPOConfig", "preference pairs, without a reference",
        pairs=True, chunked=False,
    ),
    Stage("rm", "trl", "RewardTrainer", "RewardConfig", "a reward model, of preference pairs", pairs=True, scores=True),
    Stage("grpo", "trl", "GRPOTrainer", "GRPOConfig", "answers of its own, judged by functions", generates=True),
)  # fmt: skip
STAGES = {stage.name: stage for stage in _ALL}


def stage_of(name: Any) -> Stage:
    """The stage of a name; `sft` for one that there is not, which the checks of a configuration refuse."""
    return STAGES.get(name, STAGES["sft"]) if isinstance(name, str) else STAGES["sft"]


def in_words(names: Any) -> str:
    """Names of stages as a sentence has them: `dpo, orpo or rm`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)
