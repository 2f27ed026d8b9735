"""From an adapter's folder, or a base model's name, to the patched model and its tokenizer, ready to generate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..adapters import load_adapter
from ..adapters.adapter import ADAPTER, CONFIG
from ..adapters.manifest_file import read_manifest
from ..config import KTConfig, as_config
from ..errors import KTAMXConfigError, KTAMXError, KTAMXNotAvailableError
from ..system.json_fields import read_json
from ..train.config.settings import DTYPES, RunKeys
from ..train.models import CHAT_TEMPLATES, check_weights, load_config, load_model, load_tokenizer, outline_of
from ..train.start_adapter import check_start

# What a manifest's settings say of the model, not of the machine or the training.
_OF_THE_MODEL = ("kt_backend", "kt_weight_path", "kt_expert_placement", "kt_num_gpu_experts")
_ON_GPU = ("kt_expert_placement", "kt_num_gpu_experts")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Choice:
    """What a user asks for.

    Attributes:
        adapter: The adapter's folder; None for the base model alone.
        base: Name or folder of the base model; None takes the one that the adapter's files name.
        backend: `kt_backend`; None takes the one of the adapter's manifest, or `auto`.
        device: Where all but the experts is computed: cpu, cuda, or auto for a GPU where there is one.
        template: Chat template for a tokenizer that has none: chatml or alpaca.
        chat: Whether a chat template is needed.
    """

    adapter: Path | None = None
    base: str | None = None
    backend: str | None = None
    device: str = "auto"
    template: str | None = None
    chat: bool = True


@dataclass(frozen=True)
class Opened:
    """A patched model that is ready.

    Attributes:
        model: In evaluation mode, on its device; a PeftModel where there is an adapter.
        tokenizer: With a chat template, where one was asked for.
        adapter: The adapter's folder; None without one.
        base: Name or folder of the base model.
        notes: What the user should know.
    """

    model: Any
    tokenizer: Any
    adapter: Path | None
    base: str
    notes: tuple[str, ...] = ()

    def without_adapter(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the model is the base model."""
        return self.model.disable_adapter() if self.adapter else contextlib.nullcontext()


@dataclass(frozen=True)
class Checked:
    """A choice that can be loaded: `load` does it.

    Attributes:
        choice: What was asked for, its base filled in.
        keys: The same as the keys of a run, with the dtype to load.
        kt: Settings of the experts, with the adapter's rank.
        config: The base model's configuration.
        tokenizer: As `Opened.tokenizer`.
        notes: What the user should know.
    """

    choice: Choice
    keys: RunKeys
    kt: KTConfig
    config: Any
    tokenizer: Any
    notes: tuple[str, ...]

    def load(self, console: Console | None = None) -> Opened:
        """Load the weights and patch the model.

        Raises:
            KTAMXError: Base model or adapter cannot be loaded.
        """
        import torch

        with _naming_options():
            model = load_model(self.keys, self.config, self.kt, console, rank=self.kt.kt_lora_rank or 0)
        if self.choice.adapter:
            model = load_adapter(model, self.choice.adapter, trainable=False)
        device = self.choice.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device).eval()
        return Opened(model, self.tokenizer, self.choice.adapter, self.keys.model_name_or_path, self.notes)


def check(choice: Choice) -> Checked:
    """Look at everything that can be wrong before weights are loaded.

    Raises:
        KTAMXError: No adapter there, no base model named or to be found, no chat template, a damaged file.
    """
    if choice.device not in ("auto", "cpu", "cuda"):
        raise KTAMXConfigError(f"--device {choice.device}: it must be auto, cpu or cuda.")
    if choice.template is not None and choice.template not in CHAT_TEMPLATES:
        raise KTAMXConfigError(f"--template {choice.template}: it must be {' or '.join(CHAT_TEMPLATES)}.")
    saved, dtype, named = (None, None, None) if choice.adapter is None else _of_adapter(choice.adapter)
    base = choice.base or named
    if base is None:
        raise KTAMXConfigError(
            f"{choice.adapter}: its files do not name the base model. Give it: --base NAME_OR_FOLDER."
            if choice.adapter
            else "Name an adapter's folder, or a base model alone: --base NAME_OR_FOLDER."
        )
    if choice.base and (Path(base) / CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        raise KTAMXConfigError(f"--base {base}: that is an adapter's folder. Give it without --base.")
    path = str(choice.adapter) if choice.adapter else None
    keys = RunKeys(model_name_or_path=base, adapter_name_or_path=path, template=choice.template)
    keys = replace(keys, torch_dtype=dtype or keys.torch_dtype)
    with _naming_options():
        config, notes = load_config(keys)
        outline = outline_of(keys, config)
        rank, _ = check_start(keys, outline)
        kt, more = _settings(saved or {}, choice.backend, outline)
        notes = [*notes, *more, *check_weights(keys, config)]
        tokenizer, more = _tokenizer(keys, choice)
    kt = replace(kt, kt_lora_rank=rank or 0)
    return Checked(replace(choice, base=base), keys, kt, config, tokenizer, (*notes, *more))


def _of_adapter(folder: Path) -> tuple[Mapping[str, Any] | None, str | None, str | None]:
    """(settings of the experts, dtype, base model) as far as an adapter's files tell."""
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f" {' and '.join(map(str, inside[:3]))} has one." if inside else ""
        what = "there is no such folder" if not folder.exists() else f"no adapter there ({CONFIG} and {ADAPTER})"
        raise KTAMXConfigError(f"{folder}: {what}.{hint} Name what training or kt-hf import wrote.")
    manifest = read_manifest(folder)
    named = read_json(folder / CONFIG).object().get("base_model_name_or_path")
    base = named.text() if named is not None and named.value else None
    if manifest is None:
        return None, None, base
    settings, dtype = manifest.content.get("kt"), manifest.content.get("dtype")
    if settings is not None and not isinstance(settings, dict):
        raise KTAMXError(f"{folder}: its manifest's kt={settings!r} are no settings. The file was changed.")
    dtype = dtype if dtype in DTYPES else None
    return settings, dtype, base or (manifest.base.name if manifest.base else None)


def _settings(saved: Mapping[str, Any], backend: str | None, outline: Any) -> tuple[KTConfig, list[str]]:
    """The experts' settings on this machine, and what the user should know of them."""
    from ..backends import choose_backend
    from ..discovery import find_experts
    from ..system import gpu

    values = {key: value for key, value in saved.items() if key in _OF_THE_MODEL}
    notes: list[str] = []
    if backend is not None:
        values = {"kt_backend": backend}
    if gpu.experts_device() is None:
        values = {key: value for key, value in values.items() if key not in _ON_GPU}
    kt = as_config(values)
    if backend is None and kt.kt_backend not in ("auto", "torch"):
        try:
            choose_backend(kt.kt_backend, find_experts(outline, weightless=True)[0].shape)
        except KTAMXNotAvailableError as error:
            notes.append(f"The adapter was trained on {kt.kt_backend}, which does not run here, so auto: {error}")
            kt = replace(kt, kt_backend="auto", kt_weight_path=None)
    return kt, notes


def _tokenizer(keys: RunKeys, choice: Choice) -> tuple[Any, list[str]]:
    """The adapter's own tokenizer where it has one, else the base model's."""
    folder = choice.adapter
    if folder and any((folder / name).is_file() for name in _TOKENIZER_FILES):
        keys = replace(keys, model_name_or_path=str(folder))
    tokenizer, notes = load_tokenizer(keys, chat=choice.chat and choice.template is not None)
    if choice.chat and not tokenizer.chat_template:
        raise KTAMXConfigError(
            f"{keys.model_name_or_path}: its tokenizer has no chat template, so nobody knows how a question is put to "
            "this model. Give the one it was trained with: --template chatml or --template alpaca."
        )
    return tokenizer, notes


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Errors that name the keys of a training's YAML file name this command's options."""
    try:
        yield
    except KTAMXError as error:
        text = str(error).replace("adapter_name_or_path=", "adapter ").replace("model_name_or_path=", "base model ")
        if text == str(error):
            raise
        raise type(error)(text) from error
