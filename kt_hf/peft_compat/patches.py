"""Every function of PEFT and transformers that kt_hf replaces, in one table.

Each replacement does what the original does for a model that `apply_kt_moe` has not patched. tests/peft_compat fails
when a release changes what they rely on; a function that is gone is an error at import that names the versions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from .._versions import requirement
from ..errors import KTAMXNotAvailableError
from . import checks, conversion, saving, weighted


@dataclass(frozen=True)
class Patch:
    """One function of another package that is replaced.

    Attributes:
        owner: Dotted name of the module or class that has it.
        name: Of the function in it.
        wrapper: Called in its place, with the original as first argument.
        why: What would go wrong without.
        since: First version of the owner's package that the replacement was tested with.
        until: First version of the package that needs the replacement no more; None where all do.
    """

    owner: str
    name: str
    wrapper: Callable[..., Any]
    why: str
    since: str
    until: str | None = None

    @property
    def package(self) -> str:
        """The installed package it belongs to."""
        return self.owner.split(".")[0]

    @property
    def needed(self) -> bool:
        """Whether the installed version needs the replacement."""
        return self.until is None or Version(version(self.package)) < Version(self.until)

    def resolve(self) -> Any:
        """The module or class that has the function.

        Raises:
            KTAMXNotAvailableError: It is gone, or the function is, naming both versions.
        """
        module, _, attribute = self.owner.rpartition(".")
        try:
            try:
                owner = importlib.import_module(self.owner)
            except ModuleNotFoundError:
                owner = getattr(importlib.import_module(module), attribute)
            getattr(owner, self.name)
        except (ImportError, AttributeError) as error:
            raise KTAMXNotAvailableError(
                f"kt_hf replaces {self.owner}.{self.name} ({self.why}), which "
                f"{self.package} {version(self.package)} does not have. Install a version that kt_hf was tested with: "
                f"pip install '{requirement('peft')}' '{requirement('transformers')}', or a newer kt_hf."
            ) from error
        return owner


_PEFT, _TRANSFORMERS = "0.21", "5.17"
_LORA, _TUNERS = "peft.tuners.lora.LoraModel", "peft.tuners.tuners_utils"
_CONVERSION = "peft.utils.transformers_weight_conversion"
_MERGED = "merging would take the other layers and fail at the experts, whose weights are packed"
_VERIFIED = "an adapter that lacks expert tensors would be saved, loaded or resumed from without a word"

PATCHES = (
    Patch(_CONVERSION, "convert_peft_config_for_transformers", conversion.keep_config,
          "targets would be rewritten to fused parameters that a patched model has no more", _PEFT),
    Patch(_CONVERSION, "convert_peft_adapter_state_dict_for_transformers", conversion.keep_state_dict,
          "keys of an adapter would be rewritten alike, and its experts dropped on loading", _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "inject_adapter", checks.check_and_pack,
          "wrong targets would be found late, and layers be packed at the first forward only", _PEFT),
    Patch(_TUNERS, "_maybe_include_all_linear_layers", checks.include_experts,
          "target_modules='all-linear' would leave the experts out", _PEFT),
    Patch(_LORA, "_enable_peft_forward_hooks", checks.refuse_mixed_batches,
          "a batch of several adapters would be computed with the active one", _PEFT),
    Patch(_LORA, "add_weighted_adapter", weighted.add_weighted_adapter,
          "experts would be left at zero in the weighted adapter", _PEFT),
    Patch(_LORA, "subtract_mutated_init", checks.refuse_converted_init,
          "the difference to an initial adapter is not computed for experts", _PEFT),
    Patch("peft.utils.hotswap", "_convert_scalings_to_tensor", checks.refuse_compiled_hotswap,
          "experts take scalings as numbers", _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "merge_adapter", checks.refuse_merge, _MERGED, _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "merge_and_unload", checks.refuse_merge, _MERGED, _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "unload", checks.refuse_merge, _MERGED, _PEFT),
    Patch("peft.utils.hotswap", "hotswap_adapter_from_state_dict", checks.refresh_after,
          "values written to `.data` would not reach the operators", _PEFT),
    Patch("peft.PeftModel", "save_pretrained", saving.save_verified, _VERIFIED, _PEFT),
    Patch("peft.PeftModel", "load_adapter", saving.load_verified, _VERIFIED, _PEFT),
    Patch("peft.PeftModel", "from_pretrained", saving.start_verified, _VERIFIED, _PEFT),
    Patch("peft.utils.hotswap", "load_peft_weights", saving.weights_verified, _VERIFIED, _PEFT),
    Patch("transformers.integrations.peft.PeftAdapterMixin", "load_adapter", saving.load_native_verified,
          _VERIFIED, _TRANSFORMERS),
    Patch("transformers.Trainer", "_load_from_checkpoint", saving.resume_default,
          "resuming would load the adapter into a copy of the wrong name", _TRANSFORMERS, until="5.23"),
)  # fmt: skip


def install() -> None:
    """Replace the functions of `PATCHES`, once a process.

    Raises:
        KTAMXNotAvailableError: One is gone from the installed PEFT or transformers; none is replaced then.
    """
    patches = [(patch, patch.resolve()) for patch in PATCHES if patch.needed]
    for patch, owner in patches:
        _replace(owner, patch.name, patch.wrapper)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_kt_hf", False):
        return
    of_class = isinstance(owner, type) and isinstance(owner.__dict__.get(name), classmethod)
    if of_class:
        original = original.__func__
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    if isinstance(owner, type):
        function = wrapped

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:  # a partial is no descriptor, so it would miss self
            return function(*args, **kwargs)

    wrapped._kt_hf = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)
