"""Every function of PEFT, transformers and other libraries that kt_hf replaces, in one table.

Each replacement does what the original does for a model that `apply_kt_moe` has not patched. tests/peft_compat fails
when a release changes what they rely on; a function that is gone is an error that names the versions.

`install` imports no library. A module that is in memory is patched at once, any other right after its own import,
whoever imports it; and a replacement is imported at its first call. So the order of imports makes no difference.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any

from packaging.version import Version

from .._versions import requirement
from ..errors import KTAMXNotAvailableError


@dataclass(frozen=True)
class Patch:
    """One function of another package that is replaced.

    Attributes:
        owner: Dotted name of the module or class that has it.
        name: Of the function in it.
        wrapper: `module.function` of this package, called in its place with the original as first argument.
        why: What would go wrong without.
        since: First version of the owner's package that the replacement was tested with.
        until: First version of the package that needs the replacement no more; None where all do.
        optional: The package may lack the function: what the replacement is for cannot happen then.
    """

    owner: str
    name: str
    wrapper: str
    why: str
    since: str
    until: str | None = None
    optional: bool = False

    @property
    def module(self) -> str:
        """The module that is imported for it: classes are written with a capital."""
        module, _, last = self.owner.rpartition(".")
        return module if last[:1].isupper() else self.owner

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
        try:
            owner: Any = importlib.import_module(self.module)
            if self.owner != self.module:
                owner = getattr(owner, self.owner.rpartition(".")[2])
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
_TRAINER, _ACCELERATOR = "transformers.trainer.Trainer", "accelerate.accelerator.Accelerator"
_CONVERSION = "peft.utils.transformers_weight_conversion"
_MERGED = "merging would take the other layers and fail at the experts, whose weights are packed"
_COUNTS = "packed weights are no Parameters, and would be missing from the counts"
_OF_RANK_0 = "it would write and read rank 0's experts' LoRA alone"
_VERIFIED = "an adapter that lacks expert tensors would be saved, loaded or resumed from without a word"

PATCHES = (
    Patch(_CONVERSION, "convert_peft_config_for_transformers", "conversion.keep_config",
          "targets would be rewritten to fused parameters that a patched model has no more", _PEFT),
    Patch(_CONVERSION, "convert_peft_adapter_state_dict_for_transformers", "conversion.keep_state_dict",
          "keys of an adapter would be rewritten alike, and its experts dropped on loading", _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "inject_adapter", "checks.check_and_pack",
          "wrong targets would be found late, and layers be packed at the first forward only", _PEFT),
    Patch(_TUNERS, "_maybe_include_all_linear_layers", "checks.include_experts",
          "target_modules='all-linear' would leave the experts out", _PEFT),
    Patch(_LORA, "_enable_peft_forward_hooks", "checks.refuse_mixed_batches",
          "a batch of several adapters would be computed with the active one", _PEFT),
    Patch(_LORA, "add_weighted_adapter", "weighted.add_weighted_adapter",
          "experts would be left at zero in the weighted adapter", _PEFT),
    Patch(_LORA, "subtract_mutated_init", "checks.refuse_converted_init",
          "the difference to an initial adapter is not computed for experts", _PEFT),
    Patch("peft.utils.hotswap", "_convert_scalings_to_tensor", "checks.refuse_compiled_hotswap",
          "experts take scalings as numbers", _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "merge_adapter", "checks.refuse_merge", _MERGED, _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "merge_and_unload", "checks.refuse_merge", _MERGED, _PEFT),
    Patch(f"{_TUNERS}.BaseTuner", "unload", "checks.refuse_merge", _MERGED, _PEFT),
    Patch("peft.utils.hotswap", "hotswap_adapter_from_state_dict", "checks.refresh_after",
          "values written to `.data` would not reach the operators", _PEFT),
    Patch("peft.PeftModel", "save_pretrained", "saving.save_verified", _VERIFIED, _PEFT),
    Patch("peft.PeftModel", "load_adapter", "saving.load_verified", _VERIFIED, _PEFT),
    Patch("peft.PeftModel", "from_pretrained", "saving.start_verified", _VERIFIED, _PEFT),
    Patch("peft.utils.hotswap", "load_peft_weights", "saving.weights_verified", _VERIFIED, _PEFT),
    Patch("transformers.integrations.peft.PeftAdapterMixin", "load_adapter", "saving.load_native_verified",
          _VERIFIED, _TRANSFORMERS),
    Patch("transformers.trainer.Trainer", "_load_from_checkpoint", "saving.resume_default",
          "resuming would load the adapter into a copy of the wrong name", _TRANSFORMERS, until="5.23"),
    Patch("transformers.trainer.Trainer", "_load_optimizer_and_scheduler", "resuming.begin_from",
          "its state would be loaded beside layers left on the GPU, and be rank 0's on every rank", _TRANSFORMERS),
    Patch(_TRAINER, "train", "divided.name_lost_rank", "DDP would say that a connection was closed", _TRANSFORMERS),
    Patch(_TRAINER, "save_model", "divided.save_whole", "rank 0 would save its own experts' LoRA alone", _TRANSFORMERS),
    Patch(_TRAINER, "_save_optimizer_and_scheduler", "sharded.save_whole_states",
          "FSDP's own files would lack the LoRA of other ranks' experts", _TRANSFORMERS),
    Patch(_TRAINER, "_mixed_mesh_grad_norm", "divided.clip_mixed_norm",
          "beside FSDP2's gradients those of one rank's experts would be taken for all", _TRANSFORMERS, optional=True),
    Patch(_TRAINER, "_load_best_model", "sharded.load_best", "FSDP's own files would be looked for", _TRANSFORMERS),
    Patch(_TRAINER, "_save_rng_state", "divided.save_random_state",
          "an older checkpoint could go before all ranks have written theirs", _TRANSFORMERS),
    Patch(_TRAINER, "_build_accelerator_args", "divided.all_parameters_used",
          "DDP would look for unused parameters, and fail under reentrant checkpointing", _TRANSFORMERS),
    Patch("transformers.generation.utils.GenerationMixin", "generate", "divided.generate_together",
          "a rank whose answer is complete would leave the others waiting for its experts", _TRANSFORMERS),
    Patch(_ACCELERATOR, "clip_grad_norm_", "divided.clip_whole_norm",
          "each rank would clip by the norm of its own experts' gradients", "1.15"),
    Patch(_ACCELERATOR, "prepare_model", "sharded.refuse_flat", "FSDP1 would flatten the LoRA of all experts", "1.15"),
    Patch(_ACCELERATOR, "_prepare_fsdp2", "sharded.shard_the_rest",
          "FSDP2 would shard LoRA that one rank owns, and optimizers refuse a mixture", "1.15"),
    Patch(_ACCELERATOR, "save_state", "divided.refuse_state", _OF_RANK_0, "1.15"),
    Patch(_ACCELERATOR, "load_state", "divided.refuse_state", _OF_RANK_0, "1.15"),
    Patch("peft.PeftModel", "get_nb_trainable_parameters", "counts.trainable_and_all", _COUNTS, _PEFT),
    Patch("peft.PeftMixedModel", "get_nb_trainable_parameters", "counts.trainable_and_all", _COUNTS, _PEFT),
    Patch("transformers.modeling_utils.ModuleUtilsMixin", "num_parameters", "counts.number", _COUNTS, _TRANSFORMERS),
    Patch(_TRAINER, "floating_point_ops", "counts.operations", "it would walk through all modules in each micro-batch",
          _TRANSFORMERS, optional=True),
    Patch("torch.nn.parallel.distributed.DistributedDataParallel", "__init__", "divided.meet_before_forward",
          "a rank with a forward more would wait in DDP's broadcast of buffers until the timeout", "2.9"),
    Patch("torch.nn.utils", "clip_grad_norm_", "clipping.clip_on_all_cores",
          "one core would read the gradients of LoRA on the CPU: 0.3 s a step where they are 3.3 GB", "2.9"),
    Patch("torch.optim._muon.Muon", "__init__", "other_libraries.refuse_stacked_lora",
          "it would say that it wants 2-D parameters, not which of them are to go where", "2.9", optional=True),
    Patch("liger_kernel.transformers.monkey_patch", "_bind_method_to_module", "other_libraries.keep_forward",
          "a forward of stock experts would be put on the patched ones", "0.3", optional=True),
)  # fmt: skip


def install() -> None:
    """Have the functions of `PATCHES` replaced, now or when their modules are imported. Once a process.

    Raises:
        KTAMXNotAvailableError: A module that is imported already lacks one.
    """
    if not any(isinstance(finder, _PatchAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchAfterImport())
    for module in dict.fromkeys(patch.module for patch in PATCHES):
        if module in sys.modules:
            _patch(module)


class _PatchAfterImport(MetaPathFinder):
    """Finds a module of `PATCHES` as the other finders do, and has it patched once its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(patch.module == fullname for patch in PATCHES):
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = functools.partial(_run_and_patch, spec.loader.exec_module)
            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def _run_and_patch(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    run(module)
    _patch(module.__name__)


def _patch(module: str) -> None:
    """Replace what `PATCHES` has of an imported module, all of it or nothing."""
    patches = [patch for patch in PATCHES if patch.module == module and patch.needed]
    owners = []
    for patch in patches:
        try:
            owners.append((patch, patch.resolve()))
        except KTAMXNotAvailableError:
            if not patch.optional:
                raise
    for patch, owner in owners:
        _replace(owner, patch.name, patch.wrapper)


def _replace(owner: Any, name: str, wrapper: str) -> None:
    original = getattr(owner, name)
    if getattr(original, "_kt_hf", False):
        return
    of_class = isinstance(owner, type) and isinstance(owner.__dict__.get(name), classmethod)
    if of_class:
        original = original.__func__

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _wrapper(wrapper)(original, *args, **kwargs)

    wrapped._kt_hf = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)


@functools.cache
def _wrapper(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(".")
    replacement: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __package__), function)
    return replacement
