"""`torch_compile` of a patched model: what is around the experts, module by module.

The Trainer's own switch compiles the model as a whole. Of that gradient checkpointing leaves nothing: no layer's graph
was captured with it (transformers 5.24, torch 2.9), and experts end a graph in each layer anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..experts.layer import KTExperts
from .config.stages import stage_of

# What the Trainer's arguments call them, and torch.compile.
KEYS = {"torch_compile_backend": "backend", "torch_compile_mode": "mode"}
_MODES = ("default", "max-autotune-no-cudagraphs")
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")
# Graphs of a function: layers of two kinds, lengths that are fixed and that vary, training and evaluation. PyTorch's
# limit is 8, beyond which nothing is compiled.
_GRAPHS = 64


def asked(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What torch.compile is to be given; None where it is not asked for.

    Args:
        options: Of the Trainer's arguments.
    """
    how = {name: options[key] for key, name in KEYS.items() if options.get(key) is not None}
    if "backend" in how:
        how["backend"] = str(how["backend"]).lower()  # as accelerate understands it
    if how.get("backend") == "no" or not (how or options.get("torch_compile")):
        return None
    return how


def without(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a Trainer that compiles nothing itself."""
    return {key: value for key, value in options.items() if key not in KEYS and key != "torch_compile"}


def compile_problems(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What cannot be done: (key, why and what can), of the Trainer's arguments."""
    how = asked(options) or {}
    for key, name in KEYS.items():
        value = how.get(name)
        if value in _CUDA_GRAPHS:
            yield key, f"{key}={value} records CUDA graphs, and experts on the CPU cannot be recorded: leave it out"
        elif value is not None and value not in (_MODES if name == "mode" else _backends(())):
            usual = _MODES if name == "mode" else _backends()
            yield key, f"{key}={value!r} is not known: leave it out, or take one of {', '.join(usual)}"


def _backends(without_those_for: tuple[str, ...] = ("debug", "experimental")) -> list[str]:
    found: list[str] = torch._dynamo.list_backends(without_those_for)
    return [name for name in found if name not in _CUDA_GRAPHS]


def compile_left_out(options: dict[str, Any], stage: str) -> list[str]:
    """Take it out of a trainer's options where its model generates: with a cache each layer would be compiled anew.

    Args:
        options: Of the Trainer's arguments.
        stage: Of the run.

    Returns:
        That it is left out, in words; [] where it was not asked for.
    """
    if asked(options) is None or not stage_of(stage).generates:
        return []
    for key in options.keys() - without(options).keys():
        del options[key]
    return ["torch_compile is left out: where answers are generated each layer would be compiled anew."]


def compile_around_experts(model: nn.Module, **how: Any) -> int:
    """Have the modules of decoder layers compiled when they are first called, but for those with experts in them.

    Names and parameters stay as they are, so that checkpoints do. Layers of one kind share their graphs.

    Args:
        model: Patched, with its adapters.
        **how: Of torch.compile.

    Returns:
        How many modules these are.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _GRAPHS)
    modules = [part for layer in _decoder_layers(model) for part in _called(layer) if not _has_experts(part)]
    for module in modules:
        module.compile(**how)
    return len(modules)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Members of the lists whose members have experts in them, the outermost ones, in order."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and any(_has_experts(m) for m in module.children()):
            found += module.children()
        else:
            found += _decoder_layers(module)
    return found


def _called(layer: nn.Module) -> Iterator[nn.Module]:
    """The children of a layer; of those that are lists, which nobody calls, their members."""
    for child in layer.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child)
        else:
            yield child


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(part, KTExperts) for part in module.modules())
