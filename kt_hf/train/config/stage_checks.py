"""What a stage asks of the settings, found before anything is loaded."""

from __future__ import annotations

from .checks import Checked
from .stages import stage_of

# Key -> smallest value, and whether it is allowed itself; of stages that have the key.
_LEAST = {
    "desirable_weight": (0, True), "undesirable_weight": (0, True), "num_generations": (2, True),
    "max_completion_length": (1, True), "temperature": (0, False), "steps_per_generation": (1, True),
    "num_iterations": (1, True),
}  # fmt: skip
_WITHOUT_KL = "apo_zero_unpaired"  # KTO's loss that does without an estimate of the KL divergence


def check_stage(c: Checked, purpose: str) -> None:
    """Add everything that does not fit the stage to `c.problems`.

    Args:
        c: Settings whose names and types are right.
        purpose: `train` needs reward functions for GRPO; `estimate` does not.
    """
    _ranges(c)
    _rewards(c, purpose)
    if stage_of(c.run.stage).generates:
        _answers(c)
    if c.run.stage == "kto":
        _kto(c)
    if c.run.stage == "orpo" and "max_length" in c.trainer and c.trainer["max_length"] is None:
        c.problem("max_length", "max_length=null: TRL's ORPO takes 512 tokens then: give a number")
    if c.run.stage == "pt" and c.trainer.get("assistant_only_loss"):
        c.problem("assistant_only_loss", "assistant_only_loss is for conversations, and stage: pt trains plain text")
    if stage_of(c.run.stage).generates and c.run.use_kt and c.trainer.get("use_vllm"):
        c.problem(
            "use_vllm",
            "use_vllm does not go together with use_kt: vLLM would take the experts into a server of its own, with "
            "their LoRA merged in. Leave it out: the patched model itself generates",
        )


def _ranges(c: Checked) -> None:
    beta = c.trainer.get("beta")
    if isinstance(beta, (int, float)):
        included = c.run.stage == "grpo"  # where it is the weight of a penalty, and 0 by default
        if beta < 0 or (beta == 0 and not included):
            c.problem("beta", f"beta={beta}: it must be {'at least' if included else 'more than'} 0")
    for key, (least, included) in _LEAST.items():
        value = c.trainer.get(key)
        if isinstance(value, (int, float)) and not (value > least or (included and value == least)):
            c.problem(key, f"{key}={value}: it must be {'at least' if included else 'more than'} {least}")


def _rewards(c: Checked, purpose: str) -> None:
    if not stage_of(c.run.stage).generates:
        if c.run.reward_funcs:
            c.problem("reward_funcs", f"reward_funcs is for stage: grpo, and this is stage: {c.run.stage}")
        return
    if not c.run.reward_funcs and purpose == "train":
        c.problem(
            "reward_funcs",
            "reward_funcs is missing: stage: grpo needs a function that judges answers, PATH.py:FUNCTION",
        )
    weights = c.trainer.get("reward_weights")
    if weights and len(weights) != len(c.run.reward_funcs):
        c.problem(
            "reward_weights", f"reward_weights has {len(weights)} numbers for {len(c.run.reward_funcs)} reward_funcs"
        )


def _answers(c: Checked) -> None:
    """The answers of an optimizer step, unless something else is said: whole groups, each the answers to a prompt."""
    get = c.trainer.get
    group = get("num_generations") or 8
    if get("generation_batch_size") is not None or get("steps_per_generation") is not None or group < 2:
        return
    batch, steps = get("per_device_train_batch_size", 8), get("gradient_accumulation_steps", 1)
    if batch * steps % group:
        c.problem(
            "num_generations" if "num_generations" in c.settings else "per_device_train_batch_size",
            f"num_generations={group} answers to a prompt do not fit per_device_train_batch_size={batch} x "
            f"gradient_accumulation_steps={steps} answers of a step: make their product a multiple of {group}",
        )


def _kto(c: Checked) -> None:
    """TRL refuses these after the model is loaded. Its estimate of the KL divergence takes each row's answer for the
    next row of its batch, in the order that the data have."""
    if c.trainer.get("loss_type") == _WITHOUT_KL:
        return
    if c.trainer.get("per_device_train_batch_size", 8) < 2:
        c.problem(
            "per_device_train_batch_size",
            "per_device_train_batch_size=1: KTO compares each row with the others of its batch: give 2 or more (with "
            "gradient_accumulation_steps as much smaller), or loss_type: apo_zero_unpaired",
        )
    sampling = c.trainer.get("train_sampling_strategy", "sequential")
    if sampling != "sequential":
        c.problem(
            "train_sampling_strategy",
            f"train_sampling_strategy={sampling}: KTO takes rows in the order of the data (sequential): leave it out",
        )
