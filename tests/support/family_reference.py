"""What a patched model of any family must compute: transformers' own model, LoRA merged into its weights.

The merge is part of the graph, so that autograd gives the LoRA gradients, through transformers' own experts: no code of
the package takes part. Deltas are brought into the layout that the family has its matrices in, told by their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def merged_forward(
    stock: nn.Module, patched: nn.Module, leaves: dict[str, Tensor], *args: Any, module: str = "", **inputs: Any
) -> Any:
    """`stock`, or a module of it, called with its own weights and the LoRA of `leaves`.

    Args:
        stock: The family's model, unpatched, with the same weights.
        patched: The PeftModel of the patched one.
        leaves: Its LoRA parameters by name, as leaves of a graph.
        *args: Of the call.
        module: The name of the module; "" for the whole model.
        **inputs: Of the call.
    """
    weights = dict(stock.named_parameters(remove_duplicate=False))  # tied ones have LoRA each
    changed: dict[str, Tensor] = {}
    groups: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, a in leaves.items():
        if ".lora_A." not in name:
            continue
        target = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
        layer = patched.get_submodule("base_model.model." + target)
        b = leaves[name.replace(".lora_A.", ".lora_B.")] * layer.scaling["default"]
        if a.dim() == 3:
            experts, _, projection = target.rpartition(".")
            groups.setdefault(experts, {})[projection] = (a, b)
        else:
            changed[f"{target}.weight"] = weights[f"{target}.weight"] + b @ a
    for experts, pairs in groups.items():
        deltas = {projection: b @ a for projection, (a, b) in pairs.items()}
        holder = stock.get_submodule(experts)
        in_turns = type(holder).__name__ == "GptOssExperts"
        changed |= _expert_weights(experts, dict(holder.named_parameters()), deltas, in_turns)
    inside = {name.removeprefix(f"{module}."): value for name, value in changed.items() if name.startswith(module)}
    return functional_call(stock.get_submodule(module), inside, args, inputs, tie_weights=False)


def _expert_weights(
    experts: str, weights: dict[str, Tensor], deltas: dict[str, Tensor], interleaved: bool
) -> dict[str, Tensor]:
    """The weights of an experts module, by their full names, with these deltas [E, out, in] added.

    Gate's and up's rows take turns if they are `interleaved`.
    """
    up, down = deltas["up_proj"], deltas["down_proj"]
    E = len(up)
    if "gate_up_proj" in weights:
        stacked = torch.cat([deltas["gate_proj"], up], 1)
        if interleaved:
            stacked = torch.stack([deltas["gate_proj"], up], 2).flatten(1, 2)
        pairs = {"gate_up_proj": stacked, "down_proj": down}
    elif "up_proj" in weights:
        pairs = {"up_proj": up, "down_proj": down}
    elif "mlp.w1" in weights:  # DBRX: all experts' rows one below the other, down turned
        pairs = {"mlp.w1": deltas["gate_proj"].flatten(0, 1), "mlp.v1": up.flatten(0, 1),
                 "mlp.w2": down.transpose(1, 2).flatten(0, 1)}  # fmt: skip
    else:  # a ModuleList of MLPs
        old = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        names = {p: p if f"0.{p}.weight" in weights else old[p] for p in deltas}
        pairs = {f"{e}.{names[p]}.weight": delta[e] for p, delta in deltas.items() for e in range(E)}
    return {f"{experts}.{name}": _added(weights[name], delta) for name, delta in pairs.items()}


def _added(weight: Tensor, delta: Tensor) -> Tensor:
    if weight.dim() == 3 and weight.shape[1:] != delta.shape[1:]:
        delta = delta.transpose(1, 2)
    if len(weight) > len(delta) and weight.dim() == 3:  # experts beside that compute nothing
        delta = torch.cat([delta, delta.new_zeros(len(weight) - len(delta), *delta.shape[1:])])
    return weight + delta
