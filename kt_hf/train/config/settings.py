"""What a configuration says, once it has been read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...config import KTConfig
from .stages import STAGES, stage_of

# Models and data that come with Python packages: they need no network.
BUILTIN_MODEL = "builtin:smollm2-moe"
BUILTIN_DATA = "builtin:pydoc"
_PROMPT = 512  # tokens
DTYPES = ("auto", "bfloat16", "float16", "float32")
# LLaMA-Factory's ways to mix data sets -> when `datasets.interleave_datasets` stops; None for one after the other.
MIX_STRATEGIES = {
    "concat": None,
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


# What keys of `RunKeys` may be.
CHOICES: dict[str, tuple[Any, ...]] = {
    "stage": tuple(STAGES),
    "torch_dtype": DTYPES,
    "finetuning_type": ("lora",),
    "quantization_bit": (None, 4, 8),
    "quantization_method": ("bnb",),
    "quantization_type": ("nf4", "fp4"),
}


@dataclass(frozen=True)
class RunKeys:
    """The keys that are not TRL's: name, type and default. `convert` checks their types as it does TRL's."""

    model_name_or_path: str = ""
    model_revision: str | None = None
    adapter_name_or_path: str | None = None
    trust_remote_code: bool = False
    torch_dtype: str = "auto"
    attn_implementation: str | None = None
    quantization_bit: int | None = None
    quantization_method: str = "bnb"
    quantization_type: str = "nf4"
    double_quantization: bool = True
    stage: str = "sft"
    finetuning_type: str = "lora"
    use_kt: bool = True
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_target: str | list[str] = "all"
    use_rslora: bool = False
    additional_target: list[str] = field(default_factory=list)
    loraplus_lr_ratio: float | None = None
    dataset: list[str] = field(default_factory=list)
    eval_dataset: list[str] = field(default_factory=list)
    dataset_dir: str | None = None
    mix_strategy: str = "concat"
    interleave_probs: list[float] | None = None
    val_size: float = 0.0
    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None
    mask_history: bool = False
    reward_funcs: list[str] = field(default_factory=list)
    max_samples: int | None = None
    plot_loss: bool = False
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None


@dataclass(frozen=True)
class TrainSettings:
    """A checked configuration.

    Attributes:
        source: The file it was read from.
        run: The keys that are neither TRL's nor `kt_*`: model, LoRA, data.
        kt: The `kt_*` keys.
        trainer: Keyword arguments of TRL's configuration of the stage (`SFTConfig` say), as far as they were given.
        notices: What the user should know of how the file was understood: translated, ignored, replaced.
        overrides: `key=value` of the command line, as typed.
        given: Names, as of today, of the settings that the file or the command line has.
    """

    source: str
    run: RunKeys
    kt: KTConfig
    trainer: dict[str, Any]
    notices: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()

    @property
    def output_dir(self) -> str:
        """The folder that the run writes to; TRL's default where the file names none."""
        return str(self.trainer.get("output_dir") or "trainer_output")

    @property
    def tokens_per_forward(self) -> int:
        """Tokens of a forward in training, at most; of GRPO, whose prompts are never cut, with prompts of 512."""
        stage = stage_of(self.run.stage)
        length = int(self.trainer.get("max_length", 1024) or 1024)
        if stage.generates:
            length = _PROMPT + int(self.trainer.get("max_completion_length", 256) or 256)
        return int(self.trainer.get("per_device_train_batch_size", 8)) * length * (2 if stage.pairs else 1)

    @property
    def chunked_loss(self) -> bool:
        """Whether TRL computes the loss by tiles of logits, or without any."""
        stage = stage_of(self.run.stage)
        return stage.chunked and not (stage.tokenized and self.trainer.get("label_smoothing_factor"))

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in backward; TRL's default is that they are."""
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if self.trainer.get(name) is not None:
                return bool(self.trainer[name])
        return True
