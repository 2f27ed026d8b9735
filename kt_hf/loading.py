"""`load_kt_model`: a patched model whose experts were never in memory as transformers holds them, nor twice.

Everything but routed experts comes by `from_pretrained` of the model's class, which sees modules without parameters
in their places; the experts go from the files to the backend layer by layer, the next one read while one is packed.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .checkpoint.eight_bit import SCALE_PATTERN, block_size, dequantize_rest, has_8_bits, quantized_rest
from .checkpoint.expert_index import ExpertCheckpoint, checkpoint_folder
from .checkpoint.progress import LayersBar
from .checkpoint.read_ahead import read_ahead
from .config import KTConfig, as_config
from .discovery import FLOATING, ExpertsSite, by_layer, find_experts, layer_index, skeleton
from .errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .patch import owned_shape, ranks_of_run, replace_experts
from .placement.assembly import make_packer, memory_budget
from .placement.memory_model import MemoryBudget
from .placement.order import Placement, as_placement
from .placement.packer import Packer
from .ranks import Ranks
from .shapes import ExpertShape
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
    "quantization_config": "experts are quantized by kt_backend; for other layers use from_pretrained and apply_kt_moe",
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
    """Load a patched model as `from_pretrained` and `apply_kt_moe` make it, streaming its experts from the files.

    Of the experts, memory holds the packed ones and the weights of two layers at most. They come from safetensors: one
    tensor an expert or fused, in one file or several, in bf16, fp16, fp32, or in 8 bits (FP8 or INT8 with a scale for
    each block or row), which is dequantized. Experts that are streamed to a GPU stay in 8 bits if `kt_lora_rank` is
    given, and are dequantized there. All experts are checked by the files' headers before anything is loaded. Other
    8-bit weights of a checkpoint are dequantized too, so that the model is a plain one of `dtype`.

    Args:
        path_or_name: Folder, or name of a model of the hub, which is downloaded if it is not in the cache.
        cfg: Settings, as a `KTConfig` or a mapping of its fields. The operators need `kt_lora_rank`, for they pack as
            they read; backend torch does not.
        dtype: Of the model, "auto" for the one its config names.
        console: Where a terminal is shown the progress; None means the standard error.
        placement: Which experts go to the GPU first, as `apply_kt_moe` takes it.
        tokens_per_step: Tokens of a forward in training, as `apply_kt_moe` takes them.
        **kwargs: Of `from_pretrained`, those that say how to place or convert weights excepted.

    Returns:
        The patched model on the CPU, as `apply_kt_moe` returns it.

    Raises:
        KTAMXConfigError: A setting or argument that does not fit, or a checkpoint that is none.
        KTAMXModelNotSupportedError: A model or checkpoint whose experts are of an unknown kind.
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: A damaged checkpoint, naming file and tensor.
    """
    cfg = as_config(cfg)
    _check_arguments(path_or_name, kwargs)
    refuse_parallel(None)
    source = _source(path_or_name, dtype, kwargs)
    outline, ranks = skeleton(source.config, source.trusted), ranks_of_run()
    shapes = {site.name: owned_shape(site, ranks) for site in find_experts(outline, weightless=True)}
    packer = _packer(cfg, shapes, source, ranks)
    placement = as_placement(placement)
    packer.check_placement(by_layer(shapes), placement)  # before a model of the hub is downloaded
    checkpoint = ExpertCheckpoint(checkpoint_folder(path_or_name, **source.hub), source.config, model=outline)
    budget = memory_budget(outline, source.config, tokens_per_step, source.dtype)
    _place(packer, checkpoint, source, placement, budget, by_layer(shapes))
    model = _load_rest(source, checkpoint)
    _load_experts(model, packer, checkpoint, console)
    return model


@dataclass
class _Source:
    """What is loaded: the arguments of `load_kt_model` by whom they are for.

    Attributes:
        path_or_name: Of the checkpoint.
        config: The model's configuration, a copy.
        asked: The model's dtype as it was asked for, "auto" or a floating one.
        trusted: Whether the model's own code may be run (`trust_remote_code`).
        hub: Arguments that tell where the files are.
        kwargs: The other arguments of `from_pretrained`.
    """

    path_or_name: str | Path
    config: Any
    asked: torch.dtype | str
    trusted: bool
    hub: dict[str, Any]
    kwargs: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model will have."""
        asked = self.asked
        return asked if isinstance(asked, torch.dtype) else _checked_dtype(self.config.dtype or torch.bfloat16)


def _check_arguments(path_or_name: Any, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(path_or_name, (str, Path)):
        raise KTAMXConfigError(
            f"path_or_name is a {type(path_or_name).__name__}: give a folder or a name of the hub. apply_kt_moe takes "
            "a model."
        )
    for name, fix in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise KTAMXConfigError(f"{name}={kwargs[name]!r} cannot be given to load_kt_model: {fix}.")


def _source(path_or_name: str | Path, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> _Source:
    """Sort the arguments, and read the configuration (KTAMXConfigError if there is none)."""
    older = kwargs.pop("torch_dtype", None)
    asked = _checked_dtype(older if older is not None and dtype == "auto" else dtype)
    trusted = bool(kwargs.pop("trust_remote_code", False))
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    config, kwargs = _config(path_or_name, trusted, hub, kwargs)
    return _Source(path_or_name, config, asked, trusted, hub, kwargs)


def _packer(cfg: KTConfig, shapes: Mapping[str, ExpertShape], source: _Source, ranks: Ranks | None) -> Packer:
    packer = make_packer(cfg, shapes, source.dtype, streamed=True, model_type=source.config.model_type, ranks=ranks)
    if packer.backend != "torch" and cfg.kt_lora_rank is None:
        raise KTAMXConfigError(
            f"kt_lora_rank=None: load_kt_model packs the experts for {packer.backend} while it reads them, which takes "
            "the LoRA rank. Give KTConfig(kt_lora_rank=...), the adapter's rank or more; 0 for inference."
        )
    return packer


def _place(
    packer: Packer,
    checkpoint: ExpertCheckpoint,
    source: _Source,
    placement: Placement | None,
    budget: MemoryBudget,
    shapes: Mapping[int, ExpertShape],
) -> None:
    """Decide where each expert goes, and whether those that are streamed stay in 8 bits."""
    rank = packer.config.kt_lora_rank
    # Experts that are packed later, at the first adapter, are bf16 until then.
    widened = packer.saved is not None or packer.ranks is not None or rank is None or source.dtype != torch.bfloat16
    budget = replace(budget, keep_8bit=not widened and checkpoint.keep_8bit())
    packer.place(shapes, placement, budget)
    if packer.tiers and packer.tiers.streamed and has_8_bits(source.config) and not budget.keep_8bit:
        reason = "not all of them are of 8 bits, and those of a layer of one dtype"
        if widened:
            reason = "kt_lora_rank is not given" if rank is None else f"the model is {source.dtype}"
        logger.warning("kt_hf: streamed experts are held in bf16, twice as large as in the checkpoint: %s.", reason)


def _load_experts(model: Any, packer: Packer, checkpoint: ExpertCheckpoint, console: Console | None) -> None:
    """Read the experts layer by layer and put `KTExperts` in their places."""
    expert_dtype = _checked_dtype(model.config.dtype or model.dtype)
    saved = packer.saved
    if saved is not None:
        saved.check_model(model)
    sites = [_experts_site(model, name, checkpoint) for name in checkpoint.layers]
    model.requires_grad_(False)
    kept_8bit = [packer.read_scaled(site.shape, layer_index(site.name, i)) for i, site in enumerate(sites)]
    jobs = list(zip(checkpoint.layers, kept_8bit, strict=True))
    stream = read_ahead(jobs, lambda job: checkpoint.read(job[0], expert_dtype, job[1]))
    sizes = [saved.layer_bytes(name) if saved else checkpoint.source_bytes(name) for name in checkpoint.layers]
    with LayersBar(len(sites), console) as bar, closing(stream) as weights:
        counted = bar.each(sites, sizes)
        replace_experts(model, counted, packer, lambda site: saved.layer(site.name) if saved else next(weights))
    return_freed_memory()


def _config(
    path_or_name: str | Path, trusted: bool, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, changed by those of `kwargs` that are its fields; and the rest of them."""
    from transformers import AutoConfig, PreTrainedConfig

    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), kwargs
    try:
        loaded, rest = AutoConfig.from_pretrained(
            config or path_or_name, trust_remote_code=trusted, return_unused_kwargs=True, **hub, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        raise KTAMXConfigError(f"{str(path_or_name)!r}: {' '.join(str(error).split())}") from error
    commit = getattr(loaded, "_commit_hash", None)
    if commit and not Path(path_or_name).is_dir():
        hub["revision"] = commit  # all files of one state of the repository
    return loaded, rest


def _load_rest(source: _Source, checkpoint: ExpertCheckpoint) -> Any:
    """Everything but the routed experts, by `from_pretrained`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config, kwargs = source.config, source.hub | source.kwargs
    by_auto = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or source.trusted
    if by_auto:
        kwargs["trust_remote_code"] = source.trusted
    loader = AutoModelForCausalLM if by_auto else checkpoint.model_class
    # With the configuration's FP8 transformers would make modules that compute in FP8, or dequantize by blocks of its
    # own reckoning, which refuses DeepSeek-V3 (576 rows in five blocks of 128). 8-bit values are exact in any dtype
    # of the model, so they are loaded as they are, and multiplied by their scales after.
    quantized = quantized_rest(checkpoint.files, block_size(config))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    ignored = [r"\.experts\."] + ([rf"{SCALE_PATTERN}$"] if quantized else [])
    with _without_experts(checkpoint, ignored):
        model = loader.from_pretrained(str(source.path_or_name), config=config, dtype=source.asked, **kwargs)
    dequantize_rest(model, quantized)
    kept = set(checkpoint.model_class._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected) - (set(ignored) - kept)
    return model


class _NoExperts(nn.Module):
    """In the place of a layer's experts while the rest of the model is loaded."""

    _is_hf_initialized = True  # there is nothing to initialize, which the model's _init_weights would try

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


@contextmanager
def _without_experts(checkpoint: ExpertCheckpoint, ignored: list[str]) -> Iterator[None]:
    """Models made in this context have `_NoExperts`, and do not miss what the checkpoint has for them.

    Classes in transformers' modules are swapped, for the whole process: a thread that makes a model of the same family
    meanwhile, other than by `load_kt_model`, gets one without experts.
    """
    model_class: Any = checkpoint.model_class
    with _SWAPPING:
        # A list or None; the lock stands for a class that has none of its own.
        ignored_before = vars(model_class).get("_keys_to_ignore_on_load_unexpected", _SWAPPING)
        try:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, _NoExperts)
            inherited = model_class._keys_to_ignore_on_load_unexpected or ()
            model_class._keys_to_ignore_on_load_unexpected = [*inherited, *ignored]
            yield
        finally:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, kind)
            if ignored_before is _SWAPPING:
                del model_class._keys_to_ignore_on_load_unexpected
            else:
                model_class._keys_to_ignore_on_load_unexpected = ignored_before


def _checked_dtype(dtype: torch.dtype | str) -> Any:
    checked = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if checked != "auto" and checked not in FLOATING:
        raise KTAMXConfigError(f"dtype={dtype}: give bfloat16, float16 or float32, which experts can have.")
    return checked


def _experts_site(model: Any, name: str, checkpoint: ExpertCheckpoint) -> ExpertsSite:
    parent, _, attribute = name.rpartition(".")
    experts = model.get_submodule(name)
    if not isinstance(experts, _NoExperts):
        raise KTAMXModelNotSupportedError(
            f"{name}: {type(experts).__name__} is not made by its own module's name, so the model cannot be loaded "
            "without it. Use from_pretrained and apply_kt_moe."
        )
    return ExpertsSite(name, model.get_submodule(parent), attribute, experts, checkpoint.shapes[name])
