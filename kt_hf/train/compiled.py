"""`torch_compile` of a patched model: what is around the experts, module by module.

The Trainer's own switch compiles the model as a whole. Of that gradient checkpointing leaves nothing: no layer's graph
was captured with it (transformers 5.24, torch 2.9), and experts end a graph in each layer anyway.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..experts.layer import KTExperts

# What the Trainer's arguments call them, and torch.compile.
KEYS = {"torch_compile_backend": "backend", "torch_compile_mode": "mode"}


def asked(options: dict[str, Any]) -> dict[str, Any] | None:
    """What torch.compile is to be given; None where it is not asked for.

    Args:
        options: Of the Trainer's arguments.
    """
    how = {name: options[key] for key, name in KEYS.items() if options.get(key) is not None}
    return how if how or options.get("torch_compile") else None


def without(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a Trainer that compiles nothing itself."""
    return {key: value for key, value in options.items() if key not in KEYS and key != "torch_compile"}


def compile_around_experts(model: nn.Module, **how: Any) -> int:
    """Have the modules of decoder layers compiled when they are first called, but for those with experts in them.

    Names and parameters stay as they are, so that checkpoints do. Layers of one kind share their graphs.

    Args:
        model: Patched, with its adapters.
        **how: Of torch.compile.

    Returns:
        How many modules these are.
    """
    modules = [child for layer in _decoder_layers(model) for child in layer.children() if not _has_experts(child)]
    for module in modules:
        module.compile(**how)
    return len(modules)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Members of the lists whose members have experts in them, the outermost ones, in order."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList) and any(_has_experts(member) for member in module):
            found += module
        else:
            found += _decoder_layers(module)
    return found


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(part, KTExperts) for part in module.modules())
