"""What train.py measures kt_hf against, besides stock transformers and PEFT with everything on the GPU.

`streamed`: stock transformers and PEFT, the experts' weights in host memory, moved to the GPU before a decoder layer
runs and dropped behind it, by hooks, as accelerate's offloading does with modules that are not trained. "pageable" is
from ordinary memory, as accelerate has it; "pinned" from page-locked memory, which no stock tool does in training.

`peer`: kt_kernel.sft's layer wrapper (ktransformers' own) through its public functions. "default" leaves threads and
the sharing of backward weights to it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def adapted_in_place(model: Any, adapt: Callable[[Any], Any], device: torch.device) -> Any:
    """PEFT over a model whose experts stay on the CPU: all that is trained, and all but the experts, on `device`."""
    model = adapt(model)
    base = {id(p) for module in _experts(model) for p in module.parameters() if not p.requires_grad}
    for parameter in model.parameters():
        if id(parameter) not in base:
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def streamed(model: Any, device: torch.device) -> Iterator[tuple[str, Any]]:
    for name in ("pageable", "pinned"):
        hosts: dict[int, torch.Tensor] = {}  # one layer's weights serve all, as everywhere in this benchmark
        there: list[nn.Parameter] = []  # on the GPU: a checkpoint's recompute stops before the hook behind the layer
        handles = []

        def drop(*_: Any, there: list[nn.Parameter] = there) -> None:
            for parameter in there:
                parameter.data = parameter.host
            there.clear()

        for layer in _layers(model):
            frozen = [p for m in _experts(layer) for p in m.parameters() if not p.requires_grad]
            for parameter in frozen:
                made = hosts.setdefault(parameter.data_ptr(), parameter.data)
                if name == "pinned" and device.type == "cuda" and not made.is_pinned():
                    hosts[parameter.data_ptr()] = made = made.pin_memory()
                parameter.data = made

            def bring(*_: Any, frozen: list[nn.Parameter] = frozen, there: list[nn.Parameter] = there) -> None:
                drop(there=there)
                for parameter in frozen:
                    parameter.host = parameter.data
                    parameter.data = parameter.data.to(device, non_blocking=True)
                there.extend(frozen)

            if frozen:
                handles += [layer.register_forward_pre_hook(bring), layer.register_forward_hook(drop)]
        yield f"streamed, {name}", model
        drop()
        for handle in handles:
            handle.remove()


def peer(model: Any, adapt: Callable[[Any], Any], given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    from kt_kernel.sft import (
        KTConfig,
        get_kt_trainable_params,
        kt_adapt_peft_lora,
        update_kt_lora_pointers,
        wrap_moe_layers_with_kt_wrapper,
    )

    settings: dict[str, Any] = {"kt_lora_rank": given.rank, "kt_lora_alpha": 2.0 * given.rank}
    name = "peer, default"
    if given.threads:
        name = f"peer, {given.threads} threads"
        settings |= {"kt_num_threads": given.threads, "kt_share_backward_bb": False}
        longest = max(given.batch) * given.sequence
        settings |= {"kt_model_max_length": longest, "kt_activation_policy": {"cpu": "retain", "gpu": "retain"}}
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = KTConfig(**settings)
    if given.threads:
        torch.set_num_threads(threads)
    print(f"{name}: {config.kt_num_threads} threads, shared backward weights {config.kt_share_backward_bb}, "
          f"{config.kt_activation_policy}, {torch.get_num_threads()} threads of PyTorch's")  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrappers = wrap_moe_layers_with_kt_wrapper(model, config)
    model._kt_wrappers = wrappers
    model = adapt(model)
    model.base_model.model._kt_wrappers = wrappers
    kt_adapt_peft_lora(model)
    known = {id(p) for p in model.parameters()}
    model.more_parameters = [p for p in get_kt_trainable_params(model) if id(p) not in known]
    model.refresh = lambda: update_kt_lora_pointers(model)
    model.reentrant = config.kt_activation_policy.cpu == "retain"
    yield name, model


def _layers(model: Any) -> Iterator[nn.Module]:
    yield from next(m for name, m in model.named_modules() if name.endswith("model.layers"))


def _experts(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            yield module
