"""What PEFT finds inside an expert projection: a stand-in for its weight, and the holders of its LoRA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..ranks import Share


class PackedWeight(nn.Module):
    """Stands where PEFT expects a base layer: knows the size of a projection, whose weights are in the backend.

    Args:
        in_features: Columns of an expert's matrix.
        out_features: Rows of an expert's matrix.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, held by the backend"


class ExpertLora(nn.Module):
    """Holder of one LoRA tensor of all experts, `weight` [E, r, in] or [E, out, r].

    A module of its own, so that names read `lora_A.default.weight`, as TRL and PEFT expect. `.to()`, `.half()`,
    `.cuda()` and the like leave the tensor where and what it is: it is the master of what the backend holds (on the
    CPU, or on the GPU once the model is moved there: `kt_moe_lora_device`).

    Args:
        weight: The values.
        follow_to_gpu: Whether the tensor moves to a GPU with the model.
        share: The experts that `weight` is of, where ranks divide them. A state that is loaded is of all experts and
            of it these are taken; a state that is saved is of all experts while `whole` is set.

    Attributes:
        whole: The tensor of all experts, while they are saved; None at other times, and where nothing is divided.
    """

    def __init__(self, weight: Tensor, follow_to_gpu: bool, share: Share | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.follow_to_gpu = follow_to_gpu
        self.share = share
        self.whole: Tensor | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of all experts."""
        experts = self.weight.shape[0] if self.share is None else self.share.total
        return (experts, *self.weight.shape[1:])

    def owned(self, values: Tensor) -> Tensor:
        """Of a tensor of all experts, the part of those that `weight` is of; one of another size as it is."""
        if self.share is None or values.dim() != 3 or values.shape[0] != self.share.total:
            return values
        return values[self.share.experts]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.whole is not None:
            destination[prefix + "weight"] = self.whole

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        if self.share is not None and key in state_dict:
            state_dict = {**state_dict, key: self.owned(state_dict[key]).clone()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertLora:
        # On the leaf: PEFT calls child.to(), which would by-pass an override further up.
        if self.weight.is_meta:
            return super()._apply(fn, recurse)
        moved = fn(self.weight.detach().new_empty(1)).device
        if moved.type == "cuda" and self.follow_to_gpu and moved != self.weight.device:
            self.weight.data = self.weight.data.to(moved)
            if self.weight.grad is not None:
                self.weight.grad = self.weight.grad.to(moved)
        return self


def owned_lora(model: nn.Module) -> Iterator[ExpertLora]:
    """The holders of LoRA of a model whose experts are divided among ranks; none where nothing is divided."""
    return (m for m in model.modules() if isinstance(m, ExpertLora) and m.share is not None)
