"""`adapter_name_or_path`: a run that starts from an adapter of any format that is read, with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters import Adapter, load_adapter, open_adapter
from ..adapters.adapter import ADAPTER, PREFIX
from ..discovery import find_experts
from ..errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .config.settings import RunKeys


def check_start(keys: RunKeys, outline: Any) -> tuple[int | None, list[str]]:
    """Check, before anything is loaded, that the adapter is whole and has its place in the model.

    Args:
        keys: The run's keys that are not TRL's.
        outline: The model on the meta device.

    Returns:
        The largest rank on experts that they are to be packed for, None without an adapter; and what to tell the user.

    Raises:
        KTAMXError: The adapter is damaged, of a format that cannot be trained on, or another base model's.
    """
    path = keys.adapter_name_or_path
    if path is None:
        return None, []
    with open_adapter(path, base=outline.config) as adapter:  # its files against their manifest, if there is one
        adapter.check(finite=True)
        if not keys.use_kt and ((adapter.experts and adapter.format != "peft") or not Path(path).is_dir()):
            raise KTAMXConfigError(
                f"adapter_name_or_path={path!r} is of the format {adapter.format}, and use_kt: false trains stock "
                f"PEFT's only: kt-hf export {path} NEW_FOLDER --to peft."
            )
        _check_places(adapter, outline, path)
        ranks = sorted({one.rank for one in adapter.experts.values()})
        count = len(adapter.experts) + len(adapter.modules())
    note = f"Starting from the adapter in {path} (format {adapter.format}, LoRA on {count} modules"
    note += (
        f", of rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))} on experts)."
        if ranks
        else ", not on experts)."
    )
    return max([*ranks, keys.lora_rank if not ranks else 0]), [note]


def _check_places(adapter: Adapter, outline: Any, path: str) -> None:
    modules = dict(outline.named_modules())
    for name, tensors in adapter.modules().items():
        module = modules.get(name)
        into = getattr(module, "in_features", None)
        a = tensors.get("lora_A.weight")
        if module is None or (into is not None and a is not None and a.shape[-1] != into):
            raise KTAMXConfigError(
                f"adapter_name_or_path={path!r}: its {PREFIX}{name} has no place in this model: another base model's "
                f"adapter? ({ADAPTER})"
            )
    if not adapter.experts:
        return
    try:
        shapes = {place.name: place.shape for place in find_experts(outline, weightless=True)}
    except KTAMXModelNotSupportedError:
        return  # patching the model says so, in more words
    for name, one in adapter.experts.items():
        shape = shapes.get(one.experts)
        into = None if shape is None else shape.intermediate_size if one.name == "down_proj" else shape.hidden_size
        if shape is None or one.a.shape != (shape.num_experts, one.rank, into):
            raise KTAMXConfigError(
                f"adapter_name_or_path={path!r}: its LoRA on {name} is {list(one.a.shape)} and has no place in this "
                "model: another base model's adapter?"
            )


def put_adapter(model: Any, keys: RunKeys) -> Any:
    """The model as a PeftModel with the adapter, to train on."""
    path = str(keys.adapter_name_or_path)
    if keys.use_kt:
        return load_adapter(model, path)
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path, is_trainable=True)
