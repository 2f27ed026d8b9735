"""Reading an adapter of any format, and writing it in another."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.tensor_files import stored_tensors
from ..errors import KTAMXConfigError, KTAMXError
from ..system.disk import check_space
from ..system.files import Lazy, as_path, new_folder, write_json, write_safetensors
from ..system.json_fields import read_json
from . import fused, kt, merge, peft, per_expert
from .adapter import ADAPTER, CONFIG, Adapter
from .config_file import read_config
from .manifest import check_files, write_manifest
from .manifest_file import MANIFEST, read_manifest
from .stock_forms import stock_forms
from .uniform import one_scaling, uniform

logger = logging.getLogger(__name__)
FORMATS = ("kt", "peft", "per-expert", "fused", "sglang", "merged")
"""The formats that `convert` writes: kt_hf's own, stock PEFT's stacks, a module for each expert, ktransformers' fused
file, SGLang's `.pt` file, and a merged checkpoint. The first four are read too."""
_MIXTRAL = ("mixtral", "minimax", "minimax_m2")  # model types whose hub names are w1, w2, w3


@contextmanager
def open_adapter(
    path: str | Path, config: str | Path | None = None, unfinished: bool = False, base: Any = None
) -> Iterator[Adapter]:
    """An adapter of any readable format, its tensors unread. They can be loaded as long as the context lasts.

    Args:
        path: The adapter's folder, or its safetensors file.
        config: adapter_config.json, where it is not beside the file.
        unfinished: The folder is being written: its manifest is not looked at.
        base: Folder or configuration of the base model, by which stock PEFT's LoRA of experts that are not plain is
            read; the adapter's settings name it without.

    Raises:
        KTAMXError: A file is missing, damaged, changed since its manifest was written, or its tensors do not go
            together. KTAMXConfigError where the file is of a kind that is not read.
    """
    path = as_path(path, "path")
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise KTAMXError(f"{path} does not exist.")
    if path.is_file() and path.suffix != ".safetensors":
        raise KTAMXConfigError(f"{path}: {path.suffix or 'a file without extension'} is not read, only .safetensors.")
    if path.is_dir():
        pickled = sorted(folder.glob("adapter_model.bin"))
        if pickled and not (folder / ADAPTER).exists():
            raise KTAMXConfigError(
                f"{pickled[0]} is a pickle, which is not read. Save it with safe_serialization=True."
            )
        manifest = None if unfinished else read_manifest(folder)
        if manifest is not None:
            check_files(folder, manifest)
    settings = read_config(as_path(config, "config") if config else folder / CONFIG)
    fused_file = folder / fused.FILE if path.is_dir() else path
    is_fused = fused_file.name == fused.FILE and fused_file.exists()
    main = folder / ADAPTER if path.is_dir() or is_fused else path
    tensors = stored_tensors(main) if main.exists() or not is_fused else {}
    experts = stored_tensors(fused_file) if is_fused else None
    yield adapter_of(path, settings, tensors, experts, base)


def adapter_of(
    where: Path,
    settings: dict[str, Any],
    tensors: Mapping[str, Lazy],
    experts: Mapping[str, Lazy] | None = None,
    base: Any = None,
) -> Adapter:
    """An adapter of its tensors and settings, checked.

    Args:
        where: For messages.
        settings: Of adapter_config.json, checked.
        tensors: Of adapter_model.safetensors.
        experts: Of fused_expert_lora.safetensors; None where there is none.
        base: Folder or configuration of the base model; None for the one that `settings` name.

    Raises:
        KTAMXError: A name that is none, tensors of several formats, or what `Adapter.check` refuses.
    """
    others: dict[str, Lazy] = {}
    for key, tensor in tensors.items():
        _check_key(where, key)
        if others.setdefault(_with_prefix(key), tensor) is not tensor:
            raise KTAMXError(f"{where}: {key} is there twice, as {_with_prefix(key)} too.")
    for key in experts or ():
        _check_key(where, key)
    if experts is not None:
        if any(_formats(others).values()):
            raise KTAMXError(f"{where}: the experts' LoRA is both in {fused.FILE} and in {ADAPTER}.")
        adapter = Adapter(where, "fused", settings)
        fused.read(adapter, dict(experts), others)
    else:
        adapter = Adapter(where, _format(where, others), settings)
        if adapter.format == "peft":
            peft.read(adapter, others, stock_forms(base, settings.get("base_model_name_or_path")))
        else:
            {"kt": kt, "per-expert": per_expert}[adapter.format].read(adapter, others)
    adapter.check()
    return adapter


def _check_key(where: Path, key: str) -> None:
    """Names go into messages, patterns and file names, and their numbers into memory."""
    if not key or len(key) > 512 or not key.isprintable() or re.search(r"\d{10}", key):
        raise KTAMXError(f"{where}: {key[:80]!r} is no name of a tensor.")


def _with_prefix(key: str) -> str:
    key = key.replace(".orig_module", "")  # of torch's checkpoint wrappers
    return key if key.startswith("base_model.") else f"base_model.model.{key}"


def _formats(tensors: Mapping[str, Lazy]) -> dict[str, str | None]:
    kinds = {"kt": kt.matches, "peft": peft.matches, "per-expert": per_expert.matches}
    return {
        name: next((key for key, tensor in tensors.items() if matches(key, tensor)), None)
        for name, matches in kinds.items()
    }


def _format(path: Path, tensors: Mapping[str, Lazy]) -> str:
    first_keys = {name: key for name, key in _formats(tensors).items() if key}
    if len(first_keys) > 1:
        raise KTAMXError(f"{path} mixes formats: {'; '.join(f'{name}: {key}' for name, key in first_keys.items())}.")
    return next(iter(first_keys), "kt")


def convert(
    input: str | Path,
    output: str | Path,
    to: str | None = None,
    base: str | Path | None = None,
    config: str | Path | None = None,
) -> Path:
    """Write an adapter in another format. Exact: tensors keep their dtype and, but for their layout, their values.

    What servers read (per-expert, fused, sglang) has one r and one lora_alpha for all, lora_alpha / r being the factor
    of B·A: without rsLoRA and patterns. Smaller ranks get zeros; B of modules of another factor takes up the ratio,
    rounded to its dtype, which is logged.

    Args:
        input: Folder or safetensors file of an adapter: kt, peft, per-expert or fused, recognized by its keys.
        output: A new folder; or a file, `….pt` for sglang and `fused_expert_lora.safetensors` for fused.
        to: `kt`, `peft`, `per-expert`, `fused`, `sglang` or `merged`. Without it the output's extension decides.
        base: Folder of the base model; needed for merged, to recognize Mixtral's names (per-expert), and for stock
            PEFT's LoRA of experts that are not plain, if the adapter's settings do not name a folder.
        config: adapter_config.json of the input, where it is not beside it.

    Returns:
        The output's path.

    Raises:
        KTAMXConfigError: Format and extension do not fit, the output exists, or lies in an adapter's folder where a
            loader would take it for something else.
        KTAMXError: The adapter is damaged, or holds what the format cannot say.
    """
    input, output = as_path(input, "input"), as_path(output, "output")
    target = _target(output, to)
    _check_output(output, target)
    if target == "merged" and base is None:
        raise KTAMXConfigError("to='merged' needs base, the folder of the base model.")
    with open_adapter(input, config, base=base) as adapter:
        if target == "merged":
            merge.merge(adapter, as_path(base, "base"), output)
            return output
        # A fused file alone is read with the settings of the adapter that it lies beside.
        if target in ("per-expert", "fused") and output.name != fused.FILE:
            _tell_one_scaling(adapter, output)
            adapter = uniform(adapter)
        # Gate and up as one are of twice their rank, half of B zeros; sglang has zeros for missing projections.
        size = (2 if target in ("peft", "sglang") else 1) * sum(tensor.size for _, tensor in adapter.tensors())
        check_space(output, size)
        if target == "sglang":
            _tell_left_out(adapter, output)
            fused.write_sglang(adapter, output)
        elif output.name == fused.FILE:
            _tell_left_out(adapter, output)
            write_safetensors(output, fused.parts(adapter))
        else:
            with new_folder(output) as folder:
                write_folder(adapter, folder, target, _is_mixtral(adapter, base), base)
    return output


def write_folder(adapter: Adapter, folder: Path, to: str, mixtral: bool = False, base: Any = None) -> None:
    """An adapter's folder in one of the formats that are folders; kt with its manifest."""
    if to == "fused":
        write_safetensors(folder / fused.FILE, fused.parts(adapter))
        write_safetensors(folder / ADAPTER, fused.other_parts(adapter))
        write_json(folder / CONFIG, fused.config(adapter))
    elif to == "per-expert":
        write_safetensors(folder / ADAPTER, per_expert.parts(adapter, mixtral))
        write_json(folder / CONFIG, per_expert.config(adapter, mixtral))
    elif to == "peft":
        forms = stock_forms(base, adapter.config.get("base_model_name_or_path"))
        write_safetensors(folder / ADAPTER, peft.parts(adapter, forms))
        write_json(folder / CONFIG, peft.config(adapter, forms))
    else:
        write_safetensors(folder / ADAPTER, kt.parts(adapter))
        write_json(folder / CONFIG, kt.config(adapter))
    if to == "kt":
        write_manifest(folder, None)


def _target(output: Path, to: str | None) -> str:
    by_extension = {".pt": "sglang", ".safetensors": "fused"}.get(output.suffix)
    if to is None:
        if by_extension is None:
            raise KTAMXConfigError(
                f"output={str(output)!r}: the extension does not tell a format. Give to, one of {', '.join(FORMATS)}."
            )
        to = by_extension
    if to not in FORMATS:
        raise KTAMXConfigError(f"to={to!r} is not one of {', '.join(FORMATS)}.")
    # A folder's name may have a dot in it (qwen3-30b-a3b-v1.5); only what names a file is refused.
    is_folder = output.suffix not in (".pt", ".safetensors", ".bin", ".pth", ".json", ".gguf")
    fits = {"sglang": output.suffix == ".pt", "fused": is_folder or output.name == fused.FILE}
    if not fits.get(to, is_folder):
        kinds = {"sglang": "a file ending in .pt", "fused": f"a folder, or a file called {fused.FILE}"}
        raise KTAMXConfigError(f"output={str(output)!r} does not fit to={to!r}, which is {kinds.get(to, 'a folder')}.")
    return to


def _check_output(output: Path, to: str) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise KTAMXConfigError(f"output={str(output)!r} exists already. Name another, or remove it.")
    loaded = [
        folder for folder in output.resolve().parents if (folder / CONFIG).exists() or (folder / ADAPTER).exists()
    ]
    if loaded and not (to == "fused" and output.name == fused.FILE and loaded[0] == output.resolve().parent):
        raise KTAMXConfigError(
            f"output={str(output)!r} lies inside {loaded[0]}, an adapter's folder: loaders take any weights there for "
            "the adapter's. Write it elsewhere."
        )


def _tell_left_out(adapter: Adapter, output: Path) -> None:
    if adapter.others:
        logger.warning(
            "%s holds the experts' LoRA alone; %d tensors of attention and other layers stay in %s.",
            output, len(adapter.others), adapter.where,
        )  # fmt: skip


def _tell_one_scaling(adapter: Adapter, output: Path) -> None:
    common = one_scaling(adapter)
    if common.padded or common.rescaled:
        logger.warning(
            "%s has one rank and one scaling, as its readers take: %d modules are padded with zeros to rank %d, B of "
            "%d is multiplied so that lora_alpha / r is their factor too.",
            output, common.padded, common.rank, common.rescaled,
        )  # fmt: skip


def _is_mixtral(adapter: Adapter, base: str | Path | None) -> bool:
    """Whether the base is Mixtral, or named like it: by base's config.json, else the manifest's or adapter's."""
    if base is not None:
        file = Path(base) if Path(base).is_file() else Path(base) / "config.json"
        kind = read_json(file).object().get("model_type")
        return kind is not None and kind.value in _MIXTRAL
    folder = adapter.where if adapter.where.is_dir() else adapter.where.parent
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest and manifest.base:
        return manifest.base.architecture.get("model_type") in _MIXTRAL
    return "mixtral" in str(adapter.config.get("base_model_name_or_path") or "").lower()
