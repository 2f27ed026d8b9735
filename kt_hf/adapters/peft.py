"""peft: stock PEFT's LoRA on transformers 5's fused experts (`ParamWrapper`, reached by `target_parameters`).

transformers keeps gate and up in one parameter, so they share one LoRA of rank R on [E, 2·I, H]:

    base_model.model.model.layers.{L}.mlp.experts.base_layer.lora_A.weight   gate_up: [E·R, H],   row e·R + k
    base_model.model.model.layers.{L}.mlp.experts.base_layer.lora_B.weight   gate_up: [2·I, R·E], column k·E + e
    base_model.model.model.layers.{L}.mlp.experts.lora_A.weight              down:    [E·r, I],   row e·r + k
    base_model.model.model.layers.{L}.mlp.experts.lora_B.weight              down:    [H, r·E],   column k·E + e

Rows of A count experts first, columns of B the rank first (peft.tuners.lora.layer.ParamWrapper.get_delta_weight). Two
LoRA of ranks r_g and r_u are exactly one of rank R = r_g + r_u:

    A = [A_g; A_u],   B = [[B_g, 0], [0, B_u]],   s·B·A = [s·B_g·A_g; s·B_u·A_u]

with the same s, so alpha grows with the rank (2r and 2·alpha); where gate's and up's s differ, B_u takes up the ratio.
The way back cuts the blocks apart, where they are to be seen. A LoRA that PEFT itself has trained has no such zeros:
gate and up then get a copy of A each, and the upper and the lower half of B.

Linear layers called gate_proj, up_proj or down_proj (shared experts, dense MLPs) are named by their parameter, for PEFT
takes those names in target_modules for the experts'. The keys are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXError
from ..shapes import ALIASES, PROJECTIONS
from ..system.files import Lazy, Part, part
from .adapter import PREFIX, Adapter, Projection, alpha_for, patterns, rank_alpha, scale
from .stock_forms import PLAIN, StockForm, StockForms

KEY = re.compile(r"(.*\.\d+\.(?:.*\.)?experts)(\.base_layer)?\.lora_([AB])\.weight$")


def matches(key: str, tensor: Lazy) -> bool:
    """Whether a tensor is stock PEFT's LoRA of a fused parameter: 2-D, under the name of the experts' module."""
    return bool(KEY.match(key)) and len(tensor.shape) == 2


def to_expert_rows(a: Tensor) -> Tensor:
    """A [E, r, in] -> [E·r, in]."""
    return a.reshape(-1, a.shape[-1])


def to_rank_columns(b: Tensor) -> Tensor:
    """B [E, out, r] -> [out, r·E], expert fastest."""
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def from_expert_rows(a: Tensor, rank: int) -> Tensor:
    """A [E·r, in] -> [E, r, in]."""
    return a.reshape(-1, rank, a.shape[-1])


def from_rank_columns(b: Tensor, rank: int) -> Tensor:
    """B [out, r·E] -> [E, out, r]."""
    return b.reshape(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def read(adapter: Adapter, tensors: dict[str, Lazy], forms: StockForms) -> None:
    """Fill an adapter from the tensors of a stock PEFT file.

    Args:
        adapter: To fill.
        tensors: Of the file, by key.
        forms: Of the base model's experts.

    Raises:
        KTAMXError: A is there without B, a size is no multiple of the rank, or gate_up looks like down.
    """
    pairs_by_place: dict[tuple[str, str], dict[str, Lazy]] = {}
    named = {name.rsplit(".", 1)[-1] for name in adapter.config.get("target_parameters") or []}
    nested = {KEY.match(key)[1] for key in tensors if ".base_layer.lora_" in key and KEY.match(key)}  # type: ignore[index]
    for key, tensor in tensors.items():
        match = KEY.match(key)
        if match is None or not matches(key, tensor):
            adapter.others[key] = tensor
            continue
        first = forms.of(match[1].removeprefix(PREFIX)).first
        if match[2]:
            parameter = first
        elif match[1] in nested or named & {first, "down_proj"} == {"down_proj"}:
            parameter = "down_proj"
        elif named & {first, "down_proj"} == {first}:
            parameter = first
        else:
            raise KTAMXError(
                f"{adapter.where}: {key} may belong to {first} or to down_proj; target_parameters in the config "
                f"({sorted(named)}) do not tell."
            )
        pairs_by_place.setdefault((match[1].removeprefix(PREFIX), parameter), {})[match[3]] = tensor
    pairs = {place: _pair(adapter, place, pair, forms.of(place[0])) for place, pair in pairs_by_place.items()}
    fused = {experts: pair for (experts, parameter), pair in pairs.items() if parameter == "gate_up_proj"}
    splits = _splits(adapter, fused) if fused else None
    for (experts, parameter), (a, b, rank, alpha) in pairs.items():
        if parameter != "gate_up_proj":
            adapter.add(experts, parameter, a, b, rank, alpha)
        else:
            _add_gate_and_up(adapter, experts, (a, b, rank, alpha), splits[experts] if splits else None)


_Pair = tuple[Lazy, Lazy, int, float]


def _pair(adapter: Adapter, place: tuple[str, str], pair: dict[str, Lazy], form: StockForm) -> _Pair:
    """A [E, R, in] and B [E, out, R] of a fused parameter, its rank and alpha."""
    module = ".".join(place)
    if set(pair) != {"A", "B"}:
        raise KTAMXError(f"{adapter.where}: LoRA of {module} has only lora_{''.join(pair)}, not the other of the pair.")
    rank, alpha = rank_alpha(adapter.config, module)
    a, b = pair["A"], pair["B"]
    out = (a.shape[1] if form.exchanged else b.shape[0]) if len(a.shape) == 2 else 1
    odd = place[1] == "gate_up_proj" and out % 2
    if a.shape[0] % rank or b.shape[1] != a.shape[0] or odd or 0 in a.shape + b.shape:
        raise KTAMXError(
            f"{adapter.where}: LoRA of {module} is {a.shape} and {b.shape}, which do not go with rank {rank} (by "
            "adapter_config.json)."
        )
    experts = a.shape[0] // rank - (form.spare if place[1] == form.first else 0)
    inside = b.shape[0] if form.exchanged else a.shape[1]
    if form == PLAIN:
        load_a, load_b = lambda: from_expert_rows(a.load(), rank), lambda: from_rank_columns(b.load(), rank)
    else:

        def both() -> tuple[Tensor, Tensor]:
            return form.from_stock(from_expert_rows(a.load(), rank), from_rank_columns(b.load(), rank), place[1])

        load_a, load_b = lambda: both()[0], lambda: both()[1]
    a_dtype, b_dtype = (b.dtype, a.dtype) if form.exchanged else (a.dtype, b.dtype)
    return Lazy(a_dtype, (experts, rank, inside), load_a), Lazy(b_dtype, (experts, out, rank), load_b), rank, alpha


def _splits(adapter: Adapter, fused: dict[str, _Pair]) -> dict[str, int] | None:
    """How many of each gate_up's columns of B are gate's, the others being up's; None if they are not separate.

    They are if in every layer gate's rows are zero from some column on, and up's rows before it.
    """
    splits, trained = {}, False
    for experts, (_, lazy, rank, _) in fused.items():
        b = lazy.load()
        gate, up = (half.flatten(0, 1).any(0).nonzero() for half in b.split(b.shape[1] // 2, dim=1))
        least = int(gate[-1]) + 1 if len(gate) else 0
        most = int(up[0]) if len(up) else rank
        if least > most:
            return None
        splits[experts] = rank // 2 if least <= rank // 2 <= most else least
        trained |= bool(len(gate) or len(up))
    # Nothing is to be seen in zeros; PEFT doubles the rank where it was asked for gate_proj and up_proj.
    return splits if trained or all(rank == 2 * adapter.config["r"] for _, _, rank, _ in fused.values()) else None


def _add_gate_and_up(adapter: Adapter, experts: str, pair: _Pair, split: int | None) -> None:
    a, b, rank, alpha = pair
    count, out, _ = b.shape
    whole = slice(0, rank)
    blocks = (whole, whole) if split is None else (slice(0, split), slice(split, rank))
    for index, (name, columns) in enumerate(zip(PROJECTIONS[:2], blocks, strict=True)):
        new = columns.stop - columns.start
        if new == 0:
            continue
        rows = slice(index * out // 2, (index + 1) * out // 2)

        def load_a(columns: slice = columns) -> Tensor:
            return a.load()[:, columns]

        def load_b(columns: slice = columns, rows: slice = rows) -> Tensor:
            return b.load()[:, rows, columns]

        adapter.add(
            experts,
            name,
            Lazy(a.dtype, (count, new, a.shape[2]), load_a),
            Lazy(b.dtype, (count, out // 2, new), load_b),
            new,
            alpha if new == rank else alpha_for(adapter.config, new, scale(adapter.config, rank, alpha)),
        )


def parts(adapter: Adapter, forms: StockForms) -> Iterator[Part]:
    """The tensors of a stock PEFT file.

    Args:
        adapter: Of any format.
        forms: Of the base model's experts.

    Raises:
        KTAMXError: Stock PEFT cannot hold LoRA of these experts.
    """
    forms.check_names({**adapter.layers(), **adapter.modules()})
    for experts, projections in adapter.layers().items():
        form = forms.of(experts)
        above = [projections[name] for name in PROJECTIONS[:2] if name in projections]
        down = projections.get("down_proj")
        if above:
            # The outermost wrapper's keys have no base_layer; PEFT wraps what is above the gate first.
            inner = ".base_layer" if down else ""
            yield _stack(f"{PREFIX}{experts}{inner}", above, form, form.first)
        if down:
            yield _stack(f"{PREFIX}{experts}", [down], form, "down_proj")
    for key, tensor in adapter.others.items():
        yield part(key, tensor)


def _stack(name: str, loras: list[Projection], form: StockForm, parameter: str) -> Part:
    """LoRA of a whole parameter: of one projection, or of gate and up, whose ranks are put side by side."""
    first, rank = loras[0], sum(one.rank for one in loras)
    count, inner, into = first.a.shape[0], first.b.shape[1], first.a.shape[2]
    joined = parameter == "gate_up_proj"
    out = 2 * inner if joined else inner

    def make() -> Iterator[Tensor]:
        a = torch.cat([one.a.load() for one in loras], dim=1)
        b = _block_diagonal(loras, count, rank) if joined else first.b.load()
        a, b = form.to_stock(a, b, parameter)
        yield to_expert_rows(a)
        yield to_rank_columns(b)

    a_dtype, b_dtype = first.a.dtype, first.b.dtype
    if form.exchanged:
        into, out, a_dtype, b_dtype = out, into, b_dtype, a_dtype
    columns = rank * (count + (form.spare if parameter == form.first else 0))
    specs = {f"{name}.lora_A.weight": (a_dtype, (columns, into)), f"{name}.lora_B.weight": (b_dtype, (out, columns))}
    return Part(specs, make)


def _block_diagonal(loras: list[Projection], count: int, rank: int) -> Tensor:
    """B [E, 2I, R] of gate and up (or one of them), scaled as the first is."""
    first, offset = loras[0], 0
    inner = first.b.shape[1]
    b = torch.zeros(count, 2 * inner, rank, dtype=first.b.dtype)
    for one in loras:
        row = 0 if one.name == "gate_proj" else inner
        block = one.b.load()
        if one.scaling != first.scaling:
            block = (block.double() * (one.scaling / first.scaling)).to(block.dtype)
        b[:, row : row + inner, offset : offset + one.rank] = block
        offset += one.rank
    return b


def config(adapter: Adapter, forms: StockForms) -> dict[str, Any]:
    """adapter_config.json of the same adapter for stock PEFT, whose base model's experts are of these forms."""
    taken = {*PROJECTIONS, *ALIASES}
    modules = adapter.modules()
    kept = [name for name in adapter.config.get("target_parameters") or [] if name.endswith(".weight")]  # the router's
    parameters = [
        f"{module}.weight"
        for module in modules
        if module.rsplit(".", 1)[-1] in taken or any(f".{module}.weight".endswith(f".{name}") for name in kept)
    ]
    ranks_alphas: dict[str, tuple[int, float]] = {}
    for experts, projections in adapter.layers().items():
        gate_up = [projections[name] for name in PROJECTIONS[:2] if name in projections]
        if gate_up:
            rank = sum(one.rank for one in gate_up)
            ranks_alphas[f"{experts}.{forms.of(experts).first}"] = (
                rank,
                alpha_for(adapter.config, rank, gate_up[0].scaling),
            )
        if "down_proj" in projections:
            ranks_alphas[f"{experts}.down_proj"] = projections["down_proj"].rank, projections["down_proj"].alpha
    result = {**adapter.config, "lora_dropout": 0.0}  # ParamWrapper refuses dropout
    result["target_modules"] = sorted(module for module in modules if f"{module}.weight" not in parameters)
    result["target_parameters"] = sorted({*parameters, *ranks_alphas})
    linear = {module: rank_alpha(adapter.config, module) for module in modules}
    patterns(result, ranks_alphas)
    # A parameter's pattern is looked up by the parameter's name, a module's by the module's.
    patterns(result, linear)
    patterns(result, {f"{module}.weight": linear[module] for module in modules if f"{module}.weight" in parameters})
    return result
