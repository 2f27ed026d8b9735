"""The same adapter with one rank and one scaling for all of its modules.

Of an adapter's settings SGLang and ktransformers read r and lora_alpha, llama.cpp lora_alpha and the tensors' own rank,
vLLM also use_rslora; none of them reads rank_pattern or alpha_pattern, and none says so. Here all ranks become the
largest one by zeros, and lora_alpha is such that lora_alpha / r is the factor that most weights have; where a module's
factor is another, its B takes up the ratio. So s·B·A is right for whoever computes s as lora_alpha / r.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..system.files import Lazy
from .adapter import Adapter, Projection, alpha_for, rank_alpha, scale
from .other_tensors import EMBEDDING, LINEAR

_OF_A, _OF_B = zip(LINEAR, EMBEDDING, strict=True)
_BIAS = "lora_B.bias"


@dataclass(frozen=True)
class OneScaling:
    """What all of an adapter's LoRA have in common.

    Attributes:
        rank: r.
        scaling: The factor before B·A.
        padded: Modules of another rank, which get zeros.
        rescaled: Modules of another factor, whose B is multiplied.
    """

    rank: int
    scaling: float
    padded: int = 0
    rescaled: int = 0


def one_scaling(adapter: Adapter) -> OneScaling:
    """The largest rank of an adapter's modules, and the factor that most weights of their B have.

    Args:
        adapter: Of any format.
    """
    each = [(one.rank, one.scaling, one.b.size) for one in adapter.experts.values()]
    for name, module in adapter.modules().items():
        rank, alpha = rank_alpha(adapter.config, name)
        each.append((rank, scale(adapter.config, rank, alpha), max(one.size for one in module.values())))
    if not each:
        rank, alpha = rank_alpha(adapter.config, "")
        return OneScaling(rank, scale(adapter.config, rank, alpha))
    weights: Counter[float] = Counter()
    for _, scaling, size in each:
        weights[scaling] += size
    most, scaling = max(rank for rank, _, _ in each), weights.most_common(1)[0][0]
    padded = sum(rank != most for rank, _, _ in each)
    return OneScaling(most, scaling, padded, sum(other != scaling for _, other, _ in each))


def uniform(adapter: Adapter) -> Adapter:
    """The adapter with one rank, one lora_alpha, no patterns and no rsLoRA; s·B·A of each module is what it was.

    Exact but for B of modules whose factor is not that of most: it is multiplied, and rounded to its dtype.

    Args:
        adapter: Of any format; it stays as it is.
    """
    common = one_scaling(adapter)
    config = {**adapter.config, "r": common.rank, "lora_alpha": alpha_for({}, common.rank, common.scaling)}
    config |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    experts = {name: _projection(one, common, config["lora_alpha"]) for name, one in adapter.experts.items()}
    others = dict(adapter.others)
    keys = {id(tensor): key for key, tensor in others.items()}
    for name, module in adapter.modules().items():
        ratio = scale(adapter.config, *rank_alpha(adapter.config, name)) / common.scaling
        others |= {keys[id(tensor)]: _side(part, tensor, common.rank, ratio) for part, tensor in module.items()}
    return replace(adapter, config=config, experts=experts, others=others)


def _projection(one: Projection, common: OneScaling, alpha: float) -> Projection:
    a, b = _padded(one.a, 1, common.rank), _padded(one.b, 2, common.rank)
    b = _scaled(b, one.scaling / common.scaling)
    return replace(one, rank=common.rank, alpha=alpha, scaling=common.scaling, a=a, b=b)


def _side(part: str, tensor: Lazy, rank: int, ratio: float) -> Lazy:
    """A tensor of a module that is no expert, by what PEFT calls it."""
    if part in _OF_A:
        return _padded(tensor, 0, rank)
    if part in _OF_B:
        return _scaled(_padded(tensor, 1, rank), ratio)
    return _scaled(tensor, ratio) if part == _BIAS else tensor


def _padded(tensor: Lazy, dim: int, rank: int) -> Lazy:
    """With zeros at the end of a dimension, up to `rank`."""
    missing = rank - tensor.shape[dim]
    if not missing:
        return tensor
    shape = (*tensor.shape[:dim], rank, *tensor.shape[dim + 1 :])

    def load() -> Tensor:
        old = tensor.load()
        return torch.cat([old, old.new_zeros(*shape[:dim], missing, *shape[dim + 1 :])], dim)

    return Lazy(tensor.dtype, shape, load)


def _scaled(tensor: Lazy, ratio: float) -> Lazy:
    if ratio == 1:
        return tensor
    return Lazy(tensor.dtype, tensor.shape, lambda: (tensor.load().double() * ratio).to(tensor.dtype))
