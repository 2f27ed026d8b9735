"""`kt_lora_config`: a LoraConfig that reaches what the user means."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, TaskType
from peft.tuners.lora import LoraLayer
from torch import nn

from .discovery import base_model
from .errors import KTAMXConfigError
from .experts import KTExperts, kt_layers
from .peft_compat.internals import refuses
from .shapes import ALIASES, PROJECTIONS

# Routers, whether they are a layer or hold some.
_NOT_TARGETS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*\.")
_OTHER_SENSES = re.compile(r"(^|\.)\w*(vision|visual|image|video|audio|speech)\w*\.")
# The end of a class's name -> PEFT's task, by which PEFT trains the head in full beside LoRA.
_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
_OUR_NAMES = {"r": "lora_rank", "target_modules": "lora_target"}


def kt_lora_config(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target: str | Iterable[str] = "all",
    **kwargs: Any,
) -> LoraConfig:
    """A PEFT `LoraConfig` for a patched model.

    Targets are layers of the language model. Those of a vision or audio tower are left out unless they are named; the
    head is trained in full where PEFT does so (classification, question answering), else left out too.

    Args:
        model: The model, patched by `apply_kt_moe`.
        lora_rank: LoRA rank r, 1 to 1,024.
        lora_alpha: Scaling is lora_alpha / r; a finite number above 0.
        lora_dropout: Of the linear layers, from 0 to below 1; experts train without dropout.
        lora_target: `all` (every linear layer of the language model but router and head, and every expert),
            `all_attention`, or names, as a list or separated by commas: `q_proj,gate_proj,up_proj,down_proj`. w1, w2
            and w3 mean the experts' projections. A name that only a tower has reaches the tower, and so does a full
            name.
        **kwargs: Passed on to `LoraConfig`. `task_type` follows the model's class unless it is given.

    Returns:
        The config. Its `target_modules` are last parts of names where those reach nothing else, else full names.

    Raises:
        KTAMXConfigError: A value out of range, an unknown argument, or a name that no module has, naming those there
            are.
    """
    if not isinstance(model, nn.Module):
        raise KTAMXConfigError(f"model={model!r} is no model: give the one that apply_kt_moe returned.")
    _check_numbers(lora_rank, lora_alpha, lora_dropout)
    _check_arguments(kwargs)
    base = base_model(model)
    targets = _targets(base, lora_target)
    kwargs.setdefault("task_type", task_of(base))
    try:
        return LoraConfig(
            r=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets, **kwargs
        )
    except (TypeError, ValueError) as error:
        raise KTAMXConfigError(f"LoraConfig refuses {kwargs}: {error}") from error


def linear_targets(model: Any) -> list[str]:
    """Full names of what `lora_target=all` means in a model: linear layers of the language model, and its experts.

    Routers are left out, and the head and everything beside the language model.

    Args:
        model: A transformers model, patched or not; on the meta device too. Experts are among the names if it is
            patched.
    """
    stems = _language_model(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name in _adaptable(model)
        if name.startswith(stems)
        and "." in name  # else a head of the model's class: lm_head, score, qa_outputs
        and model.get_submodule(name) is not head
        and not _NOT_TARGETS.search(name)
        and not refuses(model, name)
        and not any(_OTHER_SENSES.search(name.removeprefix(stem)) for stem in stems if name.startswith(stem))
    ]


def expert_targets(model: nn.Module) -> list[str]:
    """The names that reach the experts, [] for a model without patched layers."""
    held = {name for layer in kt_layers(model) for name in layer.shape.projections}
    return [name for name in PROJECTIONS if name in held]


def task_of(model: nn.Module) -> TaskType:
    """PEFT's task for a model's class; FEATURE_EXTRACTION for one that has no head."""
    name = type(model).__name__
    for end, task in _TASKS.items():
        if name.endswith(end):
            return task
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    generates = hasattr(model, "prepare_inputs_for_generation")
    return TaskType.CAUSAL_LM if generates else TaskType.FEATURE_EXTRACTION


def _check_numbers(rank: Any, alpha: Any, dropout: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 1024:
        raise KTAMXConfigError(f"lora_rank={rank!r} is not a positive integer up to 1024: 8 and 16 are usual.")
    if not _is_number(alpha) or alpha <= 0:
        raise KTAMXConfigError(f"lora_alpha={alpha!r} is not a finite number above 0: twice the rank is usual.")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise KTAMXConfigError(f"lora_dropout={dropout!r} is not a number from 0 to below 1: 0 is none.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_arguments(kwargs: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(LoraConfig).parameters if name not in _OUR_NAMES]
    for name in kwargs:
        if name in _OUR_NAMES:
            raise KTAMXConfigError(f"{name} is called {_OUR_NAMES[name]} in kt_lora_config.")
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "lora_rank", "lora_target"], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise KTAMXConfigError(f"{name} is no argument of kt_lora_config, nor of PEFT's LoraConfig.{hint}")


def _targets(model: Any, lora_target: Any) -> list[str]:
    """What `lora_target` means, as ends of names that reach these modules alone, or as full names."""
    everything = linear_targets(model)
    if isinstance(lora_target, str) and lora_target.strip() == "all":
        return _short(model, everything)
    if isinstance(lora_target, str) and lora_target.strip() == "all_attention":
        attention = [name for name in everything if _ATTENTION.search(name)]
        if not attention:
            raise KTAMXConfigError("lora_target=all_attention: the model has no linear layers in attention.")
        return _short(model, attention)
    targets = [target for name in _names(lora_target) for target in _named(model, name, everything)]
    return sorted(set(targets))


def _names(lora_target: Any) -> list[str]:
    names = lora_target.split(",") if isinstance(lora_target, str) else lora_target
    if not isinstance(names, Iterable) or isinstance(names, (bytes, dict)):
        raise KTAMXConfigError(f"lora_target={lora_target!r}: give all, all_attention, or names.")
    names = list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise KTAMXConfigError(f"lora_target: {wrong[0]!r} is no name: give all, all_attention, or names.")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise KTAMXConfigError("lora_target is empty: give all, all_attention, or names.")
    for name in ("all", "all_attention"):
        if name in names:
            raise KTAMXConfigError(f"lora_target: {name} stands alone, as in lora_target={name!r}.")
    return names


def _named(model: Any, name: str, everything: list[str]) -> list[str]:
    """What a name means: itself, or the language model's modules of that name where a tower has some as well."""
    for spelling in dict.fromkeys((name, ALIASES.get(name, name))):
        modules = [full for full, _ in model.named_modules() if full == spelling or full.endswith(f".{spelling}")]
        if modules:
            language = [full for full in modules if full in set(everything)]
            return [spelling] if language in ([], modules) else language
    known = sorted({full.rpartition(".")[2] for full in everything})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise KTAMXConfigError(f"lora_target: no module is called {name!r}.{hint} There are: {', '.join(known)}.")


def _short(model: nn.Module, targets: list[str]) -> list[str]:
    """Last parts of names in place of full names, as far as they reach nothing else: PEFT matches the ends of names."""
    chosen = set(targets)
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in chosen}
    return sorted({last if (last := name.rpartition(".")[2]) not in others else name for name in targets})


def _adaptable(model: nn.Module) -> list[str]:
    """Linear layers and layers of PEFT's, without what is inside of an adapted layer."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoraLayer)) and not name.startswith(adapted) and not _other_product(module)
    ]


def _other_product(module: nn.Module) -> bool:
    """Whether a model's own class computes something else with the weight of a `Linear`: in groups, for instance.

    Quantized layers of other libraries, which PEFT knows, compute the same.
    """
    kind = type(module)
    own = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    return own and isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward


def _language_model(model: nn.Module) -> tuple[str, ...]:
    """How the names of the language model's modules begin: what holds the decoder layers that have experts.

    `model.` of most models, `model.language_model.` of one that sees, two of one that answers in speech as well. A
    model without experts has ("",).
    """
    experts = [name for name, module in model.named_modules() if isinstance(module, KTExperts)] or [
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if name.endswith(".down_proj") and parameter.dim() == 3
    ]
    stems = {match[1] for name in experts if (match := re.match(r"(.*?)\w+\.\d+\.", name))}
    return tuple(sorted(stems)) or ("",)
