"""Starting from an adapter of any readable format: one of ours, of stock PEFT, of LLaMA-Factory or transformers 4."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..discovery import base_model
from ..errors import KTAMXConfigError, KTAMXError
from ..experts.holders import owned_lora
from ..experts.layer import kt_layers
from ..peft_compat.internals import PREFIX, base_parameter, saved_names, saved_whole_names
from ..system.files import as_path
from . import kt
from .adapter import Adapter, rank_alpha, scale
from .convert import open_adapter, write_folder
from .other_tensors import plain_name
from .verify import verify_adapter
from .whole import whole_shapes

logger = logging.getLogger(__name__)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = True) -> Any:
    """Put an adapter of any readable format on a patched model, with the adapter's own ranks, alphas and targets.

    Args:
        model: Patched by `apply_kt_moe`, or a PeftModel around it.
        path: The adapter's folder or safetensors file.
        name: The adapter's name in the model.
        trainable: To train on, or for inference.

    Returns:
        The PeftModel.

    Raises:
        KTAMXError: The adapter is damaged, or another base model's.
    """
    from peft import PeftModel

    if not kt_layers(model):
        raise KTAMXConfigError("load_adapter needs a patched model: call apply_kt_moe(model) before.")
    path, base = as_path(path, "path"), _config_of(model)
    if path.is_dir():
        verify_adapter(path, base=base)
    with open_adapter(path, base=base) as adapter, tempfile.TemporaryDirectory(prefix="kt-adapter-") as temporary:
        adapter.check(finite=True)
        folder = path
        if adapter.format != "kt" or not folder.is_dir():
            folder = Path(temporary) / "adapter"
            folder.mkdir()
            write_folder(adapter, folder, "kt")
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)


def _config_of(model: nn.Module) -> Any:
    """Its configuration, which names its class: that of a model made of a configuration names none."""
    inner = base_model(model)
    if getattr(inner.config, "architectures", None):
        return inner.config
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    return config


def start_from(model: Any, path: str | Path) -> None:
    """Give the model's active adapter the values of another of any readable format; both must be of the same shape.

    Args:
        model: A PeftModel around a patched model.
        path: The adapter's folder or safetensors file.

    Raises:
        KTAMXError: Another rank, scaling or set of tensors than the model's adapter has, naming the first; or the
            adapter is damaged.
    """
    name = model.active_adapters[0] if isinstance(model.active_adapters, list) else model.active_adapters()[0]
    path, base = as_path(path, "path"), _config_of(model)
    if path.is_dir():
        verify_adapter(path, base=base)
    with open_adapter(path, base=base) as adapter:
        adapter.check(finite=True)
        config = kt.config(adapter)
        parameters = saved_names(model, name) | saved_whole_names(model, name)
        tensors = dict(adapter.tensors())
        parameters |= _of_base(adapter, model, tensors.keys() - parameters.keys())
        wholes = whole_shapes(model)
        shapes = {key: wholes.get(id(parameter), tuple(parameter.shape)) for key, parameter in parameters.items()}
        fix = "apply_kt_moe(model, adapter=…) takes the adapter's own settings; the trainer then needs no peft_config."
        for key in sorted(parameters.keys() | tensors.keys()):
            saved, current = tensors.get(key), shapes.get(key)
            if saved is None or saved.shape != current:
                raise KTAMXError(
                    f"{path}: {key} is {saved.shape if saved else 'missing'}; the model's adapter has "
                    f"{'none' if current is None else current} (rank, target_modules). {fix}"
                )
        _check_scaling(model, name, adapter, config, fix)
        owners = {id(holder.weight): holder for holder in owned_lora(model)}
        with torch.no_grad():
            for key, parameter in parameters.items():
                values, holder = tensors[key].load(), owners.get(id(parameter))
                parameter.copy_(values if holder is None else holder.owned(values))
    logger.info("kt_hf: training starts from the adapter in %s.", path)


def _of_base(adapter: Adapter, model: Any, keys: Iterable[str]) -> dict[str, Any]:
    """What an adapter holds of the base model, whose embeddings were resized: key -> the model's parameter.

    Copies that PEFT writes beside are left out: the parameter they are of is there too.
    """
    parameters = {}
    for key in keys:
        module, _, parameter = plain_name(key.removeprefix(PREFIX)).rpartition(".")
        value = base_parameter(model, module, parameter) if ".lora_" not in key else None
        if value is not None:
            parameters[key] = value
    return parameters


def _check_scaling(model: Any, name: str, adapter: Adapter, config: dict[str, Any], fix: str) -> None:
    modules = dict(model.named_modules())
    factors = {module: one.scaling for module, one in adapter.experts.items()}
    factors |= {module: scale(config, *rank_alpha(config, module)) for module in adapter.modules()}
    for module, factor in factors.items():
        now = modules[f"base_model.model.{module}"].scaling[name]
        if abs(now - factor) > 1e-6 * abs(factor):
            raise KTAMXError(f"{adapter.where}: {module} is scaled by {factor}, the model's adapter by {now}. {fix}")
