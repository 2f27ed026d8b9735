"""`load_kt_model`: a patched model whose experts were never in memory as transformers holds them, nor twice.

Everything but routed experts comes by `from_pretrained` of the model's class, which sees modules without parameters
in their places; the experts go from the files to the backend layer by layer, the next one read while one is packed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .backends import LOW_BIT
from .backends.packed import PackedMatrices
from .backends.quantizer import EXPERT_BITS
from .bitsandbytes_rest import for_rest, saved_bytes
from .checkpoint.expert_index import ExpertCheckpoint
from .checkpoint.hub import checkpoint_folder
from .checkpoint.model_rest import NoExperts, Source, checked_dtype, load_rest
from .checkpoint.progress import LayersBar
from .checkpoint.read_ahead import read_ahead
from .config import KTConfig, as_config
from .discovery import ExpertsSite, by_layer, find_experts, layer_index, skeleton
from .errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .patch import OwnedWeights, owned_shape, owned_weights, replace_experts, share_of
from .placement.assembly import make_packer, memory_budget
from .placement.hosts import ranks_of_run
from .placement.memory_model import MemoryBudget
from .placement.order import Placement, as_placement
from .placement.packer import Packer
from .ranks import Ranks
from .shapes import BF16, ExpertShape
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
    "state_dict": "experts are read from safetensors files: use from_pretrained and apply_kt_moe",
    "gguf_file": "experts are read from safetensors files: use from_pretrained and apply_kt_moe",
    "variant": "experts are read from model.safetensors or its index: use from_pretrained and apply_kt_moe",
    "key_mapping": "tensors are found by the names the family has: use from_pretrained and apply_kt_moe",
    "output_loading_info": "there is no such report here: leave it out",
}
# kt_backend, and what was chosen while the checkpoint was not known yet.
_MAY_BE_LOW = ("auto", "torch")


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
    tensor an expert or fused, in one file or several, in bf16, fp16, fp32, in 8 bits (FP8 or INT8 with a scale for each
    block or row) or in 4 (docs/loading.md lists the formats). Experts of low bits that a GPU computes stay as the files
    have them if `kt_lora_rank` is given and the model is bf16; others are widened one by one as they are packed. All
    experts are checked by the files' headers, and the scales' values, before anything is loaded. Other low-bit weights
    of a checkpoint are widened too, so that the model is a plain one of `dtype`.

    Args:
        path_or_name: Folder, or name of a model of the hub, which is downloaded if it is not in the cache.
        cfg: Settings, as a `KTConfig` or a mapping of its fields. The operators need `kt_lora_rank`, for they pack as
            they read; backend torch does not.
        dtype: Of the model, "auto" for the one its config names.
        console: Where a terminal is shown the progress; None means the standard error.
        placement: Which experts go to the GPU first, as `apply_kt_moe` takes it.
        tokens_per_step: Tokens of a forward in training, as `apply_kt_moe` takes them.
        **kwargs: Of `from_pretrained`, those that say how to place or convert weights excepted. `quantization_config`,
            a `BitsAndBytesConfig`, is for linear layers outside the experts, routers and head excepted.

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
    outline = skeleton(source.config, source.trusted)
    sites = find_experts(outline, weightless=True)
    ranks = ranks_of_run(cfg, [site.shape for site in sites], lambda: _bits(cfg, source, outline))
    shapes = {site.name: owned_shape(site, ranks) for site in sites}
    if source.rest is not None:
        source.rest = for_rest(source.rest, outline, getattr(source.config, "quantization_config", None) is not None)
    packer = _packer(cfg, shapes, source, ranks, tokens_per_step)
    placement = as_placement(placement)
    packer.check_placement(by_layer(shapes), placement)  # before a model of the hub is downloaded
    checkpoint = ExpertCheckpoint(checkpoint_folder(path_or_name, **source.hub), source.config, model=outline)
    if cfg.kt_lora_rank is not None and (packer.backend in LOW_BIT or (cfg.kt_backend, packer.backend) == _MAY_BE_LOW):
        packer = _packer(cfg, shapes, source, ranks, tokens_per_step, checkpoint.stored())
    _place(packer, checkpoint, source, placement, _budget(outline, source, tokens_per_step), by_layer(shapes))
    checkpoint.check_values()
    model = load_rest(source, checkpoint, outline)
    _load_experts(model, packer, checkpoint, console)
    return model


def _bits(cfg: KTConfig, source: Source, outline: nn.Module) -> float:
    """Of an expert's weight, as it will be held."""
    if cfg.kt_expert_dtype != "bf16":
        return EXPERT_BITS[cfg.kt_expert_dtype]
    return ExpertCheckpoint(checkpoint_folder(source.path_or_name, **source.hub), source.config, model=outline).bits()


def _budget(outline: nn.Module, source: Source, tokens: int | None) -> MemoryBudget:
    """What must fit on the GPU beside the experts."""
    budget = memory_budget(outline, source.config, tokens, source.dtype)
    if source.rest is None:
        return budget
    return replace(budget, rest_bytes=budget.rest_bytes - saved_bytes(source.rest, outline, source.dtype.itemsize))


def _check_arguments(path_or_name: Any, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(path_or_name, (str, Path)):
        raise KTAMXConfigError(
            f"path_or_name is a {type(path_or_name).__name__}: give a folder or a name of the hub. apply_kt_moe takes "
            "a model."
        )
    for name, fix in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise KTAMXConfigError(f"{name}={kwargs[name]!r} cannot be given to load_kt_model: {fix}.")


def _source(path_or_name: str | Path, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> Source:
    """Sort the arguments, and read the configuration (KTAMXConfigError if there is none)."""
    older = kwargs.pop("torch_dtype", None)
    asked = checked_dtype(older if older is not None and dtype == "auto" else dtype)
    trusted = bool(kwargs.pop("trust_remote_code", False))
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    rest = kwargs.pop("quantization_config", None)
    config, kwargs = _config(path_or_name, trusted, hub, kwargs)
    return Source(path_or_name, config, asked, trusted, hub, kwargs, rest)


def _packer(
    cfg: KTConfig,
    shapes: Mapping[str, ExpertShape],
    source: Source,
    ranks: Ranks | None,
    tokens: int | None,
    stored: Sequence[PackedMatrices] = (),
) -> Packer:
    model_type = source.config.model_type
    packer = make_packer(cfg, shapes, source.dtype, True, model_type, ranks, stored, tokens)
    if packer.backend != "torch" and cfg.kt_lora_rank is None:
        raise KTAMXConfigError(
            f"kt_lora_rank=None: load_kt_model packs the experts for {packer.backend} while it reads them, which takes "
            "the LoRA rank. Give KTConfig(kt_lora_rank=...), the adapter's rank or more; 0 for inference."
        )
    return packer


def _place(
    packer: Packer,
    checkpoint: ExpertCheckpoint,
    source: Source,
    placement: Placement | None,
    budget: MemoryBudget,
    shapes: Mapping[int, ExpertShape],
) -> None:
    """Decide where each expert goes, and whether those on the GPU stay in low bits."""
    widened, own = packer.saved is not None or source.dtype != torch.bfloat16, packer.config.kt_expert_dtype
    method, bits = checkpoint.quantization.method, checkpoint.bits()
    if own != "bf16":
        if method is not None and bits < EXPERT_BITS[own] + 1:
            raise KTAMXConfigError(
                f"kt_expert_dtype={own!r}: the checkpoint's weights are quantized already ({method}, {bits:.3g} bits), "
                "and are kept as they are. Leave it out, or give a checkpoint of more bits."
            )
        if method is not None:
            logger.info("kt_hf: experts of %s (%.3g bits) are rounded once more, to %s.", method, bits, own)
        bits = EXPERT_BITS[own]
    elif method is not None:
        packer.stored_as = method
    budget = replace(budget, bits=BF16 if widened else bits)
    packer.place(shapes, placement, budget)
    if packer.tiers and packer.tiers.streamed and method is not None and budget.bits >= BF16:
        reason = f"the model is {source.dtype}" if widened else "not all of a layer are of one kind, or they are bf16"
        logger.warning("kt_hf: streamed experts are held in bf16, larger than a checkpoint of low bits: %s.", reason)


def _load_experts(model: Any, packer: Packer, checkpoint: ExpertCheckpoint, console: Console | None) -> None:
    """Read the experts layer by layer and put `KTExperts` in their places."""
    expert_dtype = checked_dtype(model.config.dtype or model.dtype)
    saved = packer.saved
    if saved is not None:
        saved.check_model(model)
    sites = [_experts_site(model, name, checkpoint) for name in checkpoint.layers]
    model.requires_grad_(False)
    jobs = [
        (site, packer.low_bit_experts(owned_shape(site, packer.ranks), layer_index(site.name, i)))
        for i, site in enumerate(sites)
    ]
    stream = read_ahead(jobs, lambda job: _owned_weights(job[0], packer, checkpoint, expert_dtype, job[1]))
    sizes = [saved.layer_bytes(name) if saved else checkpoint.source_bytes(name) for name in checkpoint.layers]
    with LayersBar(len(sites), console) as bar, closing(stream) as weights:
        counted = bar.each(sites, sizes)
        replace_experts(
            model,
            counted,
            packer,
            lambda site: owned_weights(site, packer, saved.layer(site.name)) if saved else next(weights),
        )
    return_freed_memory()


def _owned_weights(
    site: ExpertsSite, packer: Packer, checkpoint: ExpertCheckpoint, dtype: torch.dtype, low_bit: Sequence[int]
) -> OwnedWeights:
    """Read the experts of a layer that this process owns, of which some stay in low bits."""
    share = share_of(site, packer.ranks)
    if share is None:
        return owned_weights(site, packer, checkpoint.read(site.name, dtype, low_bit))
    mark = checkpoint.fingerprint(site.name, dtype, packer.config.kt_expert_dtype)
    kept = [share.lo + expert for expert in low_bit]
    return checkpoint.read(site.name, dtype, kept, share.experts), mark


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


def _experts_site(model: Any, name: str, checkpoint: ExpertCheckpoint) -> ExpertsSite:
    parent, _, attribute = name.rpartition(".")
    experts = model.get_submodule(name)
    if not isinstance(experts, NoExperts):
        raise KTAMXModelNotSupportedError(
            f"{name}: {type(experts).__name__} is not made by its own module's name, so the model cannot be loaded "
            "without it. Use from_pretrained and apply_kt_moe."
        )
    shape, form = checkpoint.shapes[name], checkpoint.forms[name]
    return ExpertsSite(name, model.get_submodule(parent), attribute, experts, shape, form)
