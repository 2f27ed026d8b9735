"""The model and the tokenizer that a configuration names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint.quantization import known_quantization
from ..config import KTConfig
from ..errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError, KTAMXNotAvailableError
from .config.settings import BUILTIN_MODEL, RunKeys
from .config.stages import stage_of
from .expert_profile import ProfileRun
from .hub import configuration_of
from .reward_model import HEAD, as_reward_model, with_score_head

logger = logging.getLogger(__name__)

# For base models, whose tokenizers have no chat template. Answers are marked, so that TRL can tell them from the rest.
_ANSWER = "{% generation %}{{ message['content'] + END }}{% endgeneration %}"
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    # Where the end of text is the end of a turn, once is enough.
    + _ANSWER.replace("END", "'<|im_end|>' + ('' if eos_token == '<|im_end|>' else eos_token or '') + '\n'")
    + "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' }}"
    + _ANSWER.replace("END", "(eos_token or '') + '\n\n'")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# What any tokenizer with a vocabulary makes tokens of.
_PROBE = "Hello, world 123"
CHAT_TEMPLATES = {"chatml": _CHATML, "alpaca": _ALPACA}


def is_builtin(name: str) -> bool:
    """Whether a model is made from an installed Python package, `builtin:…`, not from a folder or the hub."""
    return name.startswith("builtin:")


def builtin_layers(name: str) -> int | None:
    """`builtin:smollm2-moe/2` keeps the first two layers, for a quick try; None keeps all."""
    _, _, layers = name.partition("/")
    return int(layers) if layers else None


def load_config(keys: RunKeys) -> tuple[Any, list[str]]:
    """(the model's configuration, what to tell the user about it). Loads no weights; a hub name may be looked up.

    Raises:
        KTAMXConfigError: There is no such model, or it needs code of its own that is not trusted.
    """
    name = keys.model_name_or_path
    if is_builtin(name):
        config = _builtin_config(builtin_layers(name))
        return _with_attention(as_reward_model(config) if stage_of(keys.stage).scores else config, keys), []
    name = configuration_of(name, keys.model_revision)
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        kind = PreTrainedConfig.get_config_dict(name, **revision_of(keys))[0].get("model_type")
        native = kind in CONFIG_MAPPING
        trusted = keys.trust_remote_code and not native
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted, **revision_of(keys))
    except Exception as error:  # what is in config.json may make it raise anything
        raise KTAMXConfigError(f"model_name_or_path={name!r}: {in_a_line(error)}") from None
    config = _with_attention(as_reward_model(config) if stage_of(keys.stage).scores else config, keys)
    notes = []
    if keys.trust_remote_code and native:
        notes.append(f"trust_remote_code: transformers has {kind} itself, so its own class is used, not the hub's.")
    return config, notes


def revision_of(keys: RunKeys) -> dict[str, str]:
    """`revision`, for libraries' `from_pretrained`, where one is named."""
    return {"revision": keys.model_revision} if keys.model_revision else {}


def _with_attention(config: Any, keys: RunKeys) -> Any:
    if keys.attn_implementation:
        config._attn_implementation = keys.attn_implementation
    return config


def in_a_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def outline_of(keys: RunKeys, config: Any) -> Any:
    """The model on the meta device: names and sizes, no weights.

    Raises:
        KTAMXConfigError: Its class cannot be made from the configuration, an attention that is not there for instance.
    """
    from ..discovery import skeleton

    try:
        return skeleton(config, _trusted(keys, config))
    except KTAMXError:
        raise
    except Exception as error:
        raise KTAMXConfigError(f"model_name_or_path={keys.model_name_or_path!r}: {in_a_line(error)}") from None


def check_weights(keys: RunKeys, config: Any) -> list[str]:
    """Refuse a model of which a weight is missing or has another shape, by the headers of its files; a model of the hub
    is downloaded. Checkpoints that are not safetensors are judged when they are loaded.

    Returns:
        What to tell the user.

    Raises:
        KTAMXError: Naming file and weight.
    """
    if is_builtin(keys.model_name_or_path):
        return []
    from ..checkpoint.complete import check_complete

    folder = _safetensors_folder(keys)
    if folder is None:
        return []
    spare = check_complete(folder, config, _trusted(keys, config))
    if stage_of(keys.stage).scores:  # which takes the place of the language model's head
        spare = [name for name in spare if not name.startswith("lm_head.")]
    if not spare:
        return []
    return [f"The checkpoint has {len(spare)} tensors that the model has no place for: {', '.join(spare[:3])}."]


def _trusted(keys: RunKeys, config: Any) -> bool:
    return keys.trust_remote_code and not type(config).__module__.startswith("transformers.")


def load_model(
    keys: RunKeys,
    config: Any,
    kt: KTConfig | None,
    console: Console | None = None,
    placing: ProfileRun | None = None,
    tokens: int | None = None,
    rank: int | None = None,
) -> Any:
    """The model in its dtype, on the CPU, patched where `kt` is given.

    The experts of a safetensors checkpoint are streamed into the backend, packed for the run's LoRA rank. Not so where
    `placing` has to count first which of them go to the GPU: that takes the whole model. A placement that is planned
    goes by `tokens`, those of a step's forward. `rank` is the LoRA rank to pack for, `lora_rank` without.

    Raises:
        KTAMXConfigError: Its weights cannot be had.
        KTAMXError: Its experts cannot be computed, or its checkpoint is damaged.
    """
    from .. import apply_kt_moe, load_kt_model
    from ..placement.tiers import is_auto, order_matters
    from ..system import gpu

    name, rank = keys.model_name_or_path, keys.lora_rank if rank is None else rank
    planned = kt is not None and is_auto(kt) and gpu.experts_device() is not None
    counted = kt is not None and order_matters(kt)
    placement = placing.saved() if placing and (planned or counted) else None
    profile = placing.profile if placing and counted and placement is None else None
    if profile and known_quantization(config):
        logger.warning(
            "%s is quantized: it is not loaded whole to count which experts are used most, and the first of each layer "
            "go to the GPU.", name,
        )  # fmt: skip
        profile = None

    def patched(model: Any) -> Any:
        if kt is None:
            return model
        return apply_kt_moe(model, kt, placement=profile(model) if profile else placement, tokens_per_step=tokens)

    if is_builtin(name):
        return patched(_builtin_model(keys))
    try:
        if kt is not None and profile is None and not _trusted(keys, config) and _safetensors_folder(keys):
            streamed = replace(kt, kt_lora_rank=rank if kt.kt_lora_rank is None else kt.kt_lora_rank)
            try:
                return load_kt_model(
                    name, streamed, dtype=keys.torch_dtype, config=config, console=console, placement=placement,
                    tokens_per_step=tokens, **revision_of(keys), **_quantization(keys, config),
                )  # fmt: skip
            except KTAMXModelNotSupportedError as error:  # of which patching tells more, if it cannot be patched either
                logger.warning("The experts are loaded with the rest, not streamed: %s", error)
        model = _whole_model(keys, config)
    except KTAMXError:
        raise
    except Exception as error:  # safetensors and pickles raise kinds of their own for files that are damaged
        raise KTAMXConfigError(f"model_name_or_path={name!r} cannot be loaded: {in_a_line(error)}") from error
    return patched(model)


def _quantization(keys: RunKeys, config: Any) -> dict[str, Any]:
    """What `load_kt_model` takes for `quantization_bit`."""
    import torch

    from ..bitsandbytes_rest import bits_and_bytes

    if keys.quantization_bit is None:
        return {}
    dtype = getattr(torch, str(config.dtype or "bfloat16").removeprefix("torch."))
    dtype = dtype if keys.torch_dtype == "auto" else getattr(torch, keys.torch_dtype)
    made = bits_and_bytes(keys.quantization_bit, keys.quantization_type, keys.double_quantization, dtype)
    return {"quantization_config": made}


def _builtin_model(keys: RunKeys) -> Any:
    from ..builtin.smollm2_moe import load_dense, upcycle_model

    name = keys.model_name_or_path
    dense, _ = load_dense()
    model = upcycle_model(dense, num_layers=builtin_layers(name), dtype=builtin_dtype(keys))
    model = with_score_head(model) if stage_of(keys.stage).scores else model
    model.config._name_or_path = model.name_or_path = name
    if keys.attn_implementation:
        model.set_attn_implementation(keys.attn_implementation)
    return model


def _whole_model(keys: RunKeys, config: Any) -> Any:
    """By transformers, which goes on with random values where a weight is missing: that is refused."""
    from transformers import AutoModelForCausalLM

    name, trusted = keys.model_name_or_path, _trusted(keys, config)
    if keys.quantization_bit is not None:
        raise KTAMXConfigError(
            f"quantization_bit={keys.quantization_bit}: the model is loaded whole here (no safetensors, code of "
            "its own, or a placement that counts first), which goes without it. Leave it out."
        )
    kind = AutoModelForCausalLM if trusted else type(outline_of(keys, config))
    model, report = kind.from_pretrained(
        name, config=config, dtype=keys.torch_dtype, output_loading_info=True, **revision_of(keys),
        **({"trust_remote_code": True} if trusted else {}),
    )  # fmt: skip
    lost = sorted(n for n in report["missing_keys"] if not (stage_of(keys.stage).scores and n == f"{HEAD}.weight"))
    if lost:
        raise KTAMXConfigError(f"model_name_or_path={name!r} has no weights for {lost[0]} ({len(lost)} missing).")
    return model


def _safetensors_folder(keys: RunKeys) -> Path | None:
    """Where the safetensors checkpoint is, None if there is none; one of the hub is downloaded."""
    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.tensor_files import INDEX, SINGLE

    try:
        folder = checkpoint_folder(keys.model_name_or_path, **revision_of(keys))
    except KTAMXConfigError:
        return None
    return folder if (folder / SINGLE).is_file() or (folder / INDEX).is_file() else None


def load_tokenizer(keys: RunKeys, chat: bool) -> tuple[Any, list[str]]:
    """(the tokenizer, with a chat template where `chat` needs one; what to tell the user).

    Raises:
        KTAMXConfigError: There is none, or one that makes no tokens of text.
    """
    if is_builtin(keys.model_name_or_path):
        tokenizer = _builtin_tokenizer()
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                keys.model_name_or_path, trust_remote_code=keys.trust_remote_code, **revision_of(keys)
            )
        except Exception as error:  # a damaged tokenizer.json is a plain Exception of the tokenizers library
            raise KTAMXConfigError(
                f"model_name_or_path={keys.model_name_or_path!r}: no tokenizer: {in_a_line(error)}"
            ) from None
    _probe(tokenizer, keys.model_name_or_path)
    notes = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        if keys.template and chat:
            notes.append(f"template {keys.template}: the tokenizer's own chat template is used.")
    elif chat:
        name = keys.template if keys.template in CHAT_TEMPLATES else "chatml"
        tokenizer.chat_template = CHAT_TEMPLATES[name]
        notes.append(f"The tokenizer has no chat template: {name} is used, and saved with the adapter.")
    return tokenizer, notes


def _probe(tokenizer: Any, name: str) -> None:
    """transformers makes a tokenizer without a vocabulary of a folder that has no tokenizer's files."""
    try:
        ids = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    except Exception as error:
        raise KTAMXConfigError(
            f"model_name_or_path={name!r}: its tokenizer cannot be used: {in_a_line(error)}"
        ) from None
    if all(token == tokenizer.unk_token_id for token in ids):
        raise KTAMXConfigError(
            f"model_name_or_path={name!r}: its tokenizer makes no tokens of {_PROBE!r}. The folder lacks the "
            "tokenizer's files (tokenizer.json, tokenizer.model or vocab.json, and tokenizer_config.json): copy them."
        )


def builtin_dtype(keys: RunKeys) -> str:
    """The dtype that a run makes a built-in model in."""
    from ..builtin.smollm2_moe import default_dtype

    return default_dtype(keys.torch_dtype)


def _builtin_tokenizer() -> Any:
    import io
    from contextlib import redirect_stderr

    from transformers import AutoTokenizer

    from ..builtin.smollm2_moe import find_gguf

    path = find_gguf()
    try:
        with redirect_stderr(io.StringIO()):
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except ImportError as error:
        raise KTAMXNotAvailableError(f"{BUILTIN_MODEL}: {error}. Install with: pip install 'kt-hf[demo]'") from None


def _builtin_config(layers: int | None) -> Any:
    """SmolLM2-135M's sizes, as the demo makes a Mixtral of it."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=layers or 30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, num_local_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
