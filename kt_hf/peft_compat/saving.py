"""What `PeftModel.save_pretrained` and `load_adapter` do for a patched model on top of PEFT: verify.

A Trainer calls them for every save, resume and best model, before it pushes to the hub or deletes older checkpoints: an
error here stops it in time. What loading would refuse, saving refuses, and `check_trained` before the first step.

The functions that take `original` are replacements of the table `patches.PATCHES`: `original` is the function they
stand for, and the other arguments are that function's. A model that is not patched gets what `original` does.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import ADAPTER, CONFIG
from ..adapters.card import write_card
from ..adapters.config_file import as_saved, check_config, read_config
from ..adapters.convert import adapter_of, open_adapter
from ..adapters.fit import check_embeddings, check_fits
from ..adapters.manifest import begin, check_base, write_manifest
from ..adapters.manifest_file import read_manifest
from ..adapters.owned_optimizer import remove_state
from ..adapters.verify import check_checkpoint, verify_adapter
from ..adapters.whole import outlined_lora, ranks_of, whole_lora, whole_values
from ..checkpoint.tensor_files import stored_tensors
from ..errors import KTAMXConfigError, KTAMXError
from ..experts.layer import kt_layers
from ..shapes import PROJECTIONS
from ..system.disk import check_space, disk_full, is_disk_full
from ..system.files import Lazy
from ..system.json_fields import Field
from .internals import saved_names
from .placements import follow_placement

logger = logging.getLogger(__name__)
_EXPERT_KEY = re.compile(rf"\.({'|'.join(PROJECTIONS)})\.lora_[AB]\b")


def save_verified(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `PeftModel.save_pretrained`: each adapter's folder gets its manifest, once its files are checked.

    Raises:
        KTAMXError: What loading would refuse; a full disk; a tensor of the adapter that is missing from the file, of
            another shape or value, or not finite. The folder is marked as unfinished then, and does not load.
        KTAMXConfigError: safe_serialization=False, for pickles are not verified.
    """
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    arguments = call.arguments
    ranks = ranks_of(model)
    if ranks is not None and not ranks.gathered:
        with whole_lora(model):  # all ranks call it, and rank 0 writes
            return save_verified(original, model, **{**_named(call), "is_main_process": ranks.rank == 0})
    if not kt_layers(model) or not arguments["is_main_process"]:
        return original(model, *args, **kwargs)
    if not arguments["safe_serialization"]:
        raise KTAMXConfigError("safe_serialization=False: an adapter of a patched model is saved as safetensors only.")
    root, names = Path(arguments["save_directory"]), arguments["selected_adapters"] or list(model.peft_config)
    folders = {name: root if name == "default" else root / name for name in names if name in model.peft_config}
    size = sum(adapter_bytes(model, name) for name in folders)
    check_space(root, size, "Free some: this save has not begun, and earlier ones are whole")
    for folder in folders.values():
        begin(folder)
    if re.search(r"checkpoint-\d+$", root.name):
        # An earlier run's: with it, this folder would look as if the Trainer had finished it.
        (root / "trainer_state.json").unlink(missing_ok=True)
        if ranks is None:
            remove_state(root)
    result = _write(lambda: original(model, *args, **kwargs), root, size)
    for name, folder in folders.items():
        _finish(model, name, folder)
    return result


def _named(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call but the first, all by their names."""
    named = dict(list(call.arguments.items())[1:])
    return {**named.pop("kwargs", {}), **named}


def _write(save: Callable[[], Any], folder: Path, size: int) -> Any:
    """Let PEFT write; what it says of a full disk is something else each time."""
    try:
        return save()
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_full(folder / ADAPTER, size) from error


def _finish(model: Any, name: str, folder: Path) -> None:
    """Check what PEFT has written, as loading will, and write the manifest."""
    state = (folder / ADAPTER).stat()
    _check_saved(model, name, folder / ADAPTER)
    with open_adapter(folder, unfinished=True) as adapter:
        check_fits(adapter, model, name)
        write_card(folder, adapter)
    write_manifest(folder, model, state)


def adapter_bytes(model: Any, name: str) -> int:
    """About how many bytes an adapter takes on the disk: its parameters.

    Args:
        model: With the adapter.
        name: The adapter's name.
    """
    of_adapter = re.compile(rf"\.{re.escape(name)}(\.|$)")
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if of_adapter.search(n))


def check_trained(model: Any) -> None:
    """Refuse, before the first step, an adapter that could not be loaded once it is saved.

    Args:
        model: A patched model with adapters, in a PeftModel or by transformers' own `add_adapter`.

    Raises:
        KTAMXError: What loading would say.
    """
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", None) or {}
    for name in _trained(model, list(configs)):
        where = Path(f"adapter {name!r} of the model")
        with outlined_lora(model):
            state = get_peft_model_state_dict(model, adapter_name=name)
        tensors = {key: Lazy(value.dtype, tuple(value.shape), value.detach) for key, value in state.items()}
        try:
            settings = check_config(Field(where, "", as_saved(configs[name])))
            adapter = adapter_of(where, settings, tensors)
            check_fits(adapter, model, name)
            check_embeddings(adapter, model)
        except KTAMXError as error:
            raise KTAMXConfigError(f"{error} It would be trained and saved, and then not load.") from error


def _trained(model: Any, names: list[str]) -> list[str]:
    """Adapters with a parameter that is trained."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in names if any(f".{name}." in f".{parameter}." for parameter in trainable)]


def _check_saved(model: Any, adapter: str, file: Path) -> None:
    """Compare a file with the model's LoRA, tensor by tensor."""
    wholes = whole_values(model)
    expected = {key: wholes.get(id(value), value) for key, value in saved_names(model, adapter).items()}
    tensors = stored_tensors(file)
    missing = sorted(key for key in expected if key not in tensors)
    if missing:
        raise KTAMXError(
            f"{file} lacks {missing[0]} ({len(missing)} of {len(expected)} LoRA tensors): the save is incomplete. "
            "Was a state_dict passed that does not have them?"
        )
    for key, tensor in tensors.items():
        value, parameter = tensor.load(), expected.get(key)
        if parameter is not None and tuple(value.shape) != tuple(parameter.shape):
            raise KTAMXError(f"{file}: {key} is {tuple(value.shape)}, the model's is {tuple(parameter.shape)}.")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise KTAMXError(
                f"{file}: {key} holds values that are not finite: training has diverged. This save is marked as "
                "unfinished; go on from an earlier checkpoint with a lower learning rate."
            )
        if parameter is None or parameter.dtype != value.dtype:
            continue
        if not torch.equal(value, parameter.detach().cpu()):
            raise KTAMXError(f"{file}: {key} is not what the model holds: was another state_dict passed?")


def save_native_verified(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces transformers' own `model.save_pretrained` after `model.add_adapter`: saves the active adapter.

    Raises:
        KTAMXError: As `save_verified`.
    """
    folder = Path(args[0] if args else kwargs["save_directory"])
    ranks = ranks_of(model)
    if ranks is not None and not ranks.gathered:
        with whole_lora(model):
            return save_native_verified(original, model, *args, **{**kwargs, "is_main_process": ranks.rank == 0})
    if not kwargs.get("is_main_process", True):
        return original(model, *args, **kwargs)
    name = model.active_adapters()[0]
    size = adapter_bytes(model, name)
    check_space(folder, size)
    begin(folder)
    result = _write(lambda: original(model, *args, **kwargs), folder, size)
    _finish(model, name, folder)
    return result


def load_native_verified(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces transformers' own `model.load_adapter`.

    Raises:
        KTAMXError: The folder is damaged, unfinished, or of another base model.
        KTAMXConfigError: LoRA of experts for a model that is not patched, which transformers would leave out: also of
            `from_pretrained(ADAPTER)` and `pipeline(model=ADAPTER)`, which come by here.
    """
    call = inspect.signature(original).bind(model, *args, **kwargs)
    load_config = call.arguments.get("load_config")
    source = call.arguments.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    download = {**(getattr(load_config, "download_kwargs", None) or {}), **(call.arguments.get("adapter_kwargs") or {})}
    if not kt_layers(model):
        tensors = call.arguments.get("adapter_state_dict")
        refuse_unpatched(tensors if tensors is not None else _tensors_of(source, download), str(source))
    elif source is not None and Path(source).is_dir():
        verify_adapter(source)
        _check_fits(model, Path(source), None)
    return original(model, *args, **kwargs)


def _tensors_of(source: Any, download: dict[str, Any]) -> dict[str, Lazy]:
    """The tensors of an adapter that transformers is about to load; {} where there are none to be read."""
    if source is None:
        return {}
    file = Path(source) / (download.get("subfolder") or "") / ADAPTER
    if not Path(source).is_dir():
        from transformers.utils.hub import cached_file

        known = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "force_download", "proxies")
        options = {key: value for key, value in download.items() if key in known and value is not None}
        cached = cached_file(source, ADAPTER, _raise_exceptions_for_missing_entries=False, **options)
        file = Path(cached or "")
    return dict(stored_tensors(file)) if file.is_file() else {}


def refuse_unpatched(tensors: Mapping[str, Any], source: str) -> None:
    """Refuse LoRA of experts as kt_hf trains it for a model that has no place for it.

    Args:
        tensors: Of the adapter, by their keys.
        source: Where it comes from, for the message.

    Raises:
        KTAMXConfigError: Naming the ways to load it.
    """
    key = next((key for key, value in tensors.items() if _EXPERT_KEY.search(key) and len(value.shape) == 3), None)
    if key is not None:
        raise KTAMXConfigError(
            f"{source} holds LoRA of experts as kt_hf trains it ({key}), for which this model has no place: it would "
            "be left out. Load the base model, then apply_kt_moe(model, adapter=ADAPTER); or make it an adapter of "
            "stock PEFT: kt-hf export ADAPTER OUT --to peft."
        )


def load_verified(
    original: Callable[..., Any], model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Replaces `PeftModel.load_adapter`: nothing is loaded that is not whole, and nothing whole is loaded in part.

    Raises:
        KTAMXError: The folder is damaged, unfinished, of another base model, or, where a Trainer resumes from it, no
            complete checkpoint; after loading from the hub, tensors without a place.
    """
    if not kt_layers(model):
        return original(model, model_id, adapter_name, *args, **kwargs)
    call = inspect.signature(original).bind(model, model_id, adapter_name, *args, **kwargs)
    folder = Path(model_id) / (call.kwargs.get("subfolder") or call.arguments.get("kwargs", {}).get("subfolder") or "")
    if folder.is_dir():
        trainable = bool(call.arguments.get("is_trainable"))
        checkpoint = any(re.search(r"checkpoint-\d+$", part.name) for part in (folder, folder.parent))
        if trainable and checkpoint:
            check_checkpoint(folder, lambda: _check_fits(model, folder, adapter_name))
        else:
            verify_adapter(folder)
            _check_fits(model, folder, adapter_name)
    follow_placement(model, folder)
    result = original(model, model_id, adapter_name, *args, **kwargs)
    lost = [key for key in result.missing_keys if ".lora_" in key]
    lost += [key for key in result.unexpected_keys if not _is_copy(key)]
    if lost:
        raise KTAMXError(f"{model_id}: {lost[0]} ({len(lost)} in all) is in only one of adapter and model.")
    return result


def _is_copy(key: str) -> bool:
    """Whether PEFT has written what this key holds under another key too.

    So it does with resized embeddings, beside modules_to_save or retrained tokens.
    """
    return ".modules_to_save." in key or key.endswith(".token_adapter.trainable_tokens_delta")


def start_verified(
    original: Callable[..., Any], kind: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any
) -> Any:
    """Replaces `PeftModel.from_pretrained`, which packs the experts: the adapter's placement is taken over before.

    Raises:
        KTAMXError: The folder's adapter_config.json is damaged.
        KTAMXConfigError: The adapter's placement is another model's.
    """
    if isinstance(model, nn.Module) and isinstance(model_id, (str, Path)):
        folder = Path(model_id) / (kwargs.get("subfolder") or "")
        if kt_layers(model) and (folder / CONFIG).is_file():
            read_config(folder / CONFIG)  # before PEFT believes it
        follow_placement(model, folder)
    return original(kind, model, model_id, *args, **kwargs)


def resume_default(original: Callable[..., Any], trainer: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
    """Replaces `Trainer._load_from_checkpoint` of transformers before 5.23.

    The original leaves the adapter "default" at its start where a checkpoint holds other adapters in folders beside
    it, as DPO's `ref`.
    """
    result, model = original(trainer, folder, *args, **kwargs), trainer.model
    if kt_layers(model) and (Path(folder) / ADAPTER).exists() and any(Path(folder).glob(f"*/{ADAPTER}")):
        active = model.active_adapters[0]
        model.load_adapter(folder, "default", is_trainable=active == "default")
        model.set_adapter(active)
    return result


def _check_fits(model: Any, folder: Path, name: str | None) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        check_base(folder, manifest, model)
    with open_adapter(folder) as adapter:
        if adapter.experts and adapter.format != "kt":
            raise KTAMXConfigError(
                f"{folder} is an adapter of format {adapter.format}. Start from it by apply_kt_moe(model, adapter=…), "
                "or convert it with kt_hf.adapters.convert(…, to='kt')."
            )
        check_fits(adapter, model, name if name and name in model.peft_config else None)


def weights_verified(original: Callable[..., Any], model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `load_peft_weights` where hot-swapping calls it, which does not come by `load_adapter`.

    Raises:
        KTAMXError: The folder is damaged or unfinished.
    """
    folder = Path(model_id)
    if folder.is_dir() and (folder / CONFIG).exists() and read_manifest(folder) is not None:
        verify_adapter(folder)
    return original(model_id, *args, **kwargs)
