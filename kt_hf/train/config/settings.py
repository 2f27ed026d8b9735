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
    """The keys of `kt-hf train` that are neither TRL's nor `kt_*`. `convert` checks their types as it does TRL's.

    Attributes:
        model_name_or_path: Needed: a folder, a name on the hub, or `builtin:smollm2-moe` (`builtin:smollm2-moe/2`: its
            first two layers).
        model_revision: Branch, tag or commit of a model of the hub; its main branch without.
        adapter_name_or_path: Start from this adapter (folder or file, of any format `kt-hf import` reads), with its
            rank, alpha and targets; `use_kt: false` takes stock PEFT's.
        trust_remote_code: Run code that comes with the model; where transformers has the model itself, its own class is
            used anyway, and that is said.
        torch_dtype: `auto`, `bfloat16`, `float16` or `float32`. `auto` is the checkpoint's.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, …; transformers picks one without.
        quantization_bit: `4` or `8`: linear layers outside the experts, by bitsandbytes, routers and head excepted
            (docs/low-bit.md).
        quantization_method: `bnb`, the only one there is.
        quantization_type: Of 4 bits: `nf4` or `fp4`.
        double_quantization: Whether scales of 4 bits are quantized too.
        stage: `pt`, `sft`, `dpo`, `kto`, `orpo`, `rm` or `grpo` (docs/cli.md#stages).
        finetuning_type: `lora`, the only one there is.
        use_kt: `false` trains the same file with transformers and PEFT alone.
        lora_rank: LoRA rank r, of linear layers and experts.
        lora_alpha: The factor before B·A is lora_alpha / lora_rank.
        lora_dropout: Of the linear layers; experts train without.
        lora_target: `all` (linear layers but router and head, and every expert), `all_attention`, or names. On
            DeepSeek's latent attention q_proj, k_proj and v_proj mean the projections it has in their place.
        use_rslora: The factor before B·A is lora_alpha / sqrt(lora_rank).
        additional_target: Modules trained in full and saved with the adapter: `embed_tokens,lm_head` (PEFT's
            modules_to_save).
        loraplus_lr_ratio: LoRA+: B learns so many times faster than A.
        dataset: Needed: files or folders (json, jsonl, parquet, csv, tsv), names in `dataset_info.json` or on the hub
            (`owner/name`), `builtin:pydoc`; several by commas (docs/cli.md#data).
        eval_dataset: The same, to evaluate on.
        dataset_dir: The folder of LLaMA-Factory's `dataset_info.json`, if there is one; `data` without.
        mix_strategy: Several data sets one after the other (`concat`), or in turn: `interleave_under` until the first
            is used up, `interleave_over` until all are (rows of the shorter come again), `interleave_once` until all
            are, each row once.
        interleave_probs: Shares of the data sets in an interleaved mixture: `0.7,0.3`.
        val_size: A share or a number of rows held out of `dataset`, to evaluate on.
        template: The tokenizer's chat template is used where there is one; `chatml` or `alpaca` for base models.
        default_system: The system message of conversations that have none.
        enable_thinking: Passed to the chat template of every conversation that does not set it itself.
        mask_history: Only the last answer of a conversation is trained.
        reward_funcs: Of `stage: grpo`: `PATH.py:FUNCTION`, `package.module:function`, or the name of one of TRL's
            (`accuracy_reward`).
        max_samples: Rows of each data set; all without.
        plot_loss: `loss.png`, `expert_load.png` and `report.html` beside the adapter (docs/using.md#watching-a-run).
        overwrite_output_dir: A folder with an earlier run is refused without it; with it, that run's checkpoints are
            removed: folders `checkpoint-<number>` that hold an adapter or a trainer's state, and nothing else.
        resume_from_checkpoint: `true`: the last complete checkpoint in `output_dir`, and it is said which later ones
            are not; or a checkpoint's folder.
    """

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
