"""`load_kt_model`: a patched model whose experts were never in memory twice, or even once, as transformers holds them.

Everything but routed experts comes by the model class's own `from_pretrained`, which sees modules without parameters in
their places; the experts go from the files to the backend layer by layer, the next one read while one is packed.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .backends import ExpertWeights
from .checkpoint.eight_bit import FLOATING, SCALE_PATTERN, block_size, dequantize_rest, has_8_bits, quantized_rest
from .checkpoint.expert_index import ExpertCheckpoint, checkpoint_folder
from .checkpoint.progress import LayersBar
from .config import KTConfig, as_config
from .discovery import ExpertsSite, find_experts, layer_index, skeleton
from .errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .patch import replace_experts
from .placement.assembly import make_packer, memory_budget
from .placement.order import Placement, as_placement
from .system.memory import return_freed_memory
from .system.parallel import refuse_parallel

logger = logging.getLogger(__name__)

# Arguments of from_pretrained that tell where the files are; the others are the model's.
_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
_MOVED = "the experts go to the CPU operators, and Trainer moves the rest to the GPU: leave it out"
_REFUSED = {
    "device_map": _MOVED,
    "max_memory": _MOVED,
    "offload_folder": _MOVED,
    "tp_plan": "the model is not split over processes: leave it out",
    "tp_size": "the model is not split over processes: leave it out",
    "distributed_config": "the model is not split over processes: leave it out",
    "device_mesh": "the model is not split over processes: leave it out",
    "quantization_config": "experts are quantised by kt_backend; for other layers use from_pretrained and apply_kt_moe",
    "state_dict": "experts are read from safetensors files: use from_pretrained and apply_kt_moe",
    "gguf_file": "experts are read from safetensors files: use from_pretrained and apply_kt_moe",
    "variant": "experts are read from model.safetensors or its index: use from_pretrained and apply_kt_moe",
    "key_mapping": "tensors are found by the names the family has: use from_pretrained and apply_kt_moe",
    "output_loading_info": "there is no such report here: leave it out",
}
_SWAPPING = threading.Lock()


def load_kt_model(
    path_or_name: str | Path,
    cfg: KTConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    console: Console | None = None,
    placement: Placement | Mapping[int, torch.Tensor] | str | Path | None = None,
    tokens_per_step: int | None = None,
    **kwargs: Any,
) -> Any:
    """A model as `from_pretrained` and `apply_kt_moe` make it, with never more experts in memory than packed ones and
    the weights of two layers.

    The experts are streamed from the checkpoint's safetensors files: one tensor an expert or fused, in one file or
    several, in bf16, fp16, fp32, or of 8 bits (FP8 or INT8 with a scale for each block or row), which is de-quantised;
    experts that are streamed to a GPU stay of 8 bits, if `kt_lora_rank` is given, and are de-quantised there. All of
    them are checked by the files' headers before anything is loaded. A checkpoint's other weights of 8 bits are
    de-quantised as well, so that the model is a plain one of `dtype`.

    Args:
        path_or_name: Folder, or name of a model of the hub, which is downloaded if it is not in the cache.
        cfg: Settings, as a `KTConfig` or a mapping of its fields. The operators need `kt_lora_rank`, for they pack as
            they read; backend torch does not.
        dtype: Of the model, "auto" for the one its config names.
        console: Where a terminal is shown the progress; None means the standard error.
        placement: As `apply_kt_moe` takes it, and `tokens_per_step`.
        kwargs: Of `from_pretrained`, those that say how to place or convert weights excepted.

    Returns:
        The patched model on the CPU, as `apply_kt_moe` returns it.

    Raises:
        KTAMXConfigError: A setting or argument that does not fit, or a checkpoint that is none.
        KTAMXModelNotSupportedError: A model or checkpoint whose experts are of an unknown kind.
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: A damaged checkpoint, naming file and tensor.
    """
    cfg = as_config(cfg)
    if not isinstance(path_or_name, (str, Path)):
        raise KTAMXConfigError(
            f"path_or_name is a {type(path_or_name).__name__}: give a folder or a name of the hub. apply_kt_moe takes "
            "a model."
        )
    for name, fix in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise KTAMXConfigError(f"{name}={kwargs[name]!r} cannot be given to load_kt_model: {fix}.")
    refuse_parallel(None)
    older = kwargs.pop("torch_dtype", None)
    dtype = _checked_dtype(older if older is not None and dtype == "auto" else dtype)
    trusted = bool(kwargs.pop("trust_remote_code", False))
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    config, kwargs = _config(path_or_name, trusted, hub, kwargs)
    outline = skeleton(config, trusted)
    found = find_experts(outline, weightless=True)
    coming = dtype if isinstance(dtype, torch.dtype) else _checked_dtype(config.dtype or torch.bfloat16)
    named = {site.name: site.shape for site in found}
    packer = make_packer(cfg, named, coming, streamed=True, model_type=config.model_type)
    if packer.backend != "torch" and cfg.kt_lora_rank is None:
        raise KTAMXConfigError(
            f"kt_lora_rank=None: load_kt_model packs the experts for {packer.backend} while it reads them, which takes "
            "the LoRA rank. Give KTConfig(kt_lora_rank=...), the adapter's rank or more; 0 for inference."
        )
    placement, shapes = as_placement(placement), {layer_index(p.name, i): p.shape for i, p in enumerate(found)}
    packer.check_placement(shapes, placement)  # before a model of the hub is downloaded
    checkpoint = ExpertCheckpoint(checkpoint_folder(path_or_name, **hub), config, trusted)
    budget = memory_budget(outline, config, tokens_per_step, coming)
    # Experts that are packed later, at the first adapter, are bf16 until then.
    whole = packer.saved is not None or cfg.kt_lora_rank is None or coming != torch.bfloat16
    budget = replace(budget, keep_8bit=not whole and checkpoint.keep_8bit())
    packer.place(shapes, placement, budget)
    if packer.tiers and packer.tiers.streamed and has_8_bits(config) and not budget.keep_8bit:
        why = "kt_lora_rank is not given" if cfg.kt_lora_rank is None else f"the model is {coming}"
        told = why if whole else "not all of them are of 8 bits, and those of a layer of one dtype"
        logger.warning("kt_hf: streamed experts are held in bf16, twice as large as in the checkpoint: %s.", told)
    model = _load_rest(path_or_name, checkpoint, config, dtype, trusted, hub | kwargs)
    expert_dtype = _checked_dtype(model.config.dtype or model.dtype)
    if packer.saved is not None:
        packer.saved.check_model(model)
    sites = [_site(model, name, checkpoint) for name in checkpoint.layers]
    model.requires_grad_(False)
    saved = packer.saved
    apart = [packer.read_scaled(site.shape, layer_index(site.name, i)) for i, site in enumerate(sites)]
    sizes = [saved.layer_bytes(name) if saved else checkpoint.source_bytes(name) for name in checkpoint.layers]
    with LayersBar(len(sites), console) as bar, closing(_stream(checkpoint, expert_dtype, apart)) as weights:
        counted = bar.each(sites, sizes)
        replace_experts(model, counted, packer, lambda at: saved.layer(at.name) if saved else next(weights))
    return_freed_memory()
    return model


def _config(
    path_or_name: str | Path, trusted: bool, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, changed by those of `kwargs` that are its fields; and the rest of them."""
    from transformers import AutoConfig, PreTrainedConfig

    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), kwargs
    try:
        found, rest = AutoConfig.from_pretrained(
            config or path_or_name, trust_remote_code=trusted, return_unused_kwargs=True, **hub, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        raise KTAMXConfigError(f"{str(path_or_name)!r}: {' '.join(str(error).split())}") from error
    commit = getattr(found, "_commit_hash", None)
    if commit and not Path(path_or_name).is_dir():
        hub["revision"] = commit  # all files of one state of the repository
    return found, rest


def _load_rest(
    path_or_name: str | Path,
    checkpoint: ExpertCheckpoint,
    config: Any,
    dtype: torch.dtype | str,
    trusted: bool,
    kwargs: dict[str, Any],
) -> Any:
    """Everything but the routed experts, by `from_pretrained`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    by_auto = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trusted
    more = {"trust_remote_code": trusted} if by_auto else {}
    loader = AutoModelForCausalLM if by_auto else checkpoint.model_class
    # With the configuration's FP8 transformers would make modules that compute in FP8, or de-quantise by blocks of its
    # own reckoning, which refuses DeepSeek-V3 (576 rows in five blocks of 128). Values of 8 bits are exact in any dtype
    # of the model, so they are loaded as they are, and multiplied by their scales after.
    quantized = quantized_rest(checkpoint.files, block_size(config))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    ignored = [r"\.experts\."] + ([rf"{SCALE_PATTERN}$"] if quantized else [])
    with _without_experts(checkpoint, ignored):
        model = loader.from_pretrained(str(path_or_name), config=config, dtype=dtype, **more, **kwargs)
    dequantize_rest(model, quantized)
    kept = set(checkpoint.model_class._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected) - (set(ignored) - kept)
    return model


class _NoExperts(nn.Module):
    """In the place of a layer's experts while the rest of the model is loaded."""

    _is_hf_initialized = True  # there is nothing to initialise, which the model's _init_weights would try

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


@contextmanager
def _without_experts(checkpoint: ExpertCheckpoint, ignored: list[str]) -> Iterator[None]:
    """Models made in this context have `_NoExperts`, and do not miss what the checkpoint has for them."""
    model_class: Any = checkpoint.model_class
    with _SWAPPING:  # the classes are the process's
        own = vars(model_class).get("_keys_to_ignore_on_load_unexpected", _SWAPPING)  # a list, None, or inherited
        try:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, _NoExperts)
            before = model_class._keys_to_ignore_on_load_unexpected or ()
            model_class._keys_to_ignore_on_load_unexpected = [*before, *ignored]
            yield
        finally:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, kind)
            if own is _SWAPPING:
                del model_class._keys_to_ignore_on_load_unexpected
            else:
                model_class._keys_to_ignore_on_load_unexpected = own


def _checked_dtype(dtype: torch.dtype | str) -> Any:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and found not in FLOATING:
        raise KTAMXConfigError(f"dtype={dtype}: give bfloat16, float16 or float32, which experts can have.")
    return found


def _site(model: Any, name: str, checkpoint: ExpertCheckpoint) -> ExpertsSite:
    parent, _, attribute = name.rpartition(".")
    experts = model.get_submodule(name)
    if not isinstance(experts, _NoExperts):
        raise KTAMXModelNotSupportedError(
            f"{name}: {type(experts).__name__} is not made by its own module's name, so the model cannot be loaded "
            "without it. Use from_pretrained and apply_kt_moe."
        )
    return ExpertsSite(name, model.get_submodule(parent), attribute, experts, checkpoint.shapes[name])


def _stream(
    checkpoint: ExpertCheckpoint, dtype: torch.dtype, apart: Sequence[Sequence[int]]
) -> Generator[ExpertWeights, None, None]:
    """The layers' weights in order, each read while the one before is in use; `apart`, of each layer, as they are."""
    with ThreadPoolExecutor(1, "kt_hf-read") as reader:
        jobs = list(zip(checkpoint.layers, apart, strict=True))
        coming = reader.submit(checkpoint.read, jobs[0][0], dtype, jobs[0][1])
        for following in [*jobs[1:], None]:
            weights = coming.result()
            if following is not None:
                coming = reader.submit(checkpoint.read, following[0], dtype, following[1])
            yield weights
