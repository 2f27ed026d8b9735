"""How stock PEFT holds LoRA of a model's experts, where these are not plain: what peft.py writes and reads differently.

PEFT's ParamWrapper takes a stack's second dimension for its outputs, unless the module says `is_transposed`. A stack
that is transposed without saying so (Llama 4) gets the two matrices exchanged: W is [E, in, out], and A^T B^T is the
same product. Where gate's and up's rows take turns (gpt-oss), so do B's. A stack without a gate is called up_proj
(Nemotron-H), one with rows of identity experts (LongCat) has LoRA for those too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model_names import ModelNames
from ..discovery import find_experts, skeleton
from ..errors import KTAMXError, KTAMXModelNotSupportedError
from ..forms.stacked import Form

_LOCAL: dict[str, Any] = {"local_files_only": True}
_INSTEAD = "Export it merged (to='merged'), or load it with kt_hf."


@dataclass(frozen=True)
class StockForm:
    """What of a layer's experts decides about stock PEFT's LoRA; the default is a plain one.

    Attributes:
        first: The parameter above the gate.
        exchanged: A and B stand for each other, transposed.
        interleaved: Gate's and up's outputs take turns.
        spare: Experts in the first parameter that compute nothing.
    """

    first: str = "gate_up_proj"
    exchanged: bool = False
    interleaved: bool = False
    spare: int = 0

    def to_stock(self, a: Tensor, b: Tensor, parameter: str) -> tuple[Tensor, Tensor]:
        """A [E, r, in] and B [E, out, r] as stock PEFT stacks them, before they are laid out in two dimensions.

        Args:
            a: Of the whole parameter, gate before up.
            b: Likewise.
            parameter: Its name.
        """
        if parameter == self.first:
            if self.interleaved:
                b = torch.stack(b.chunk(2, dim=1), 2).flatten(1, 2)
            if self.spare:
                a, b = (torch.cat([t, t.new_zeros(self.spare, *t.shape[1:])]) for t in (a, b))
        return (b.transpose(1, 2), a.transpose(1, 2)) if self.exchanged else (a, b)

    def from_stock(self, a: Tensor, b: Tensor, parameter: str) -> tuple[Tensor, Tensor]:
        """The inverse of `to_stock`.

        Args:
            a: [E, r, in] as PEFT has it.
            b: [E, out, r] likewise.
            parameter: The parameter's name.
        """
        if self.exchanged:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        if parameter == self.first:
            if self.spare:
                a, b = (t[: len(t) - self.spare] for t in (a, b))
            if self.interleaved:
                b = torch.cat([b[:, 0::2], b[:, 1::2]], 1)
        return a.contiguous(), b.contiguous()


PLAIN = StockForm()


class StockForms:
    """Of each layer of a model, by the full name of its experts.

    Args:
        config: The model's configuration; None where it is not known, and every layer taken for a plain one.

    Raises:
        KTAMXModelNotSupportedError: The model's experts cannot be computed.
    """

    def __init__(self, config: Any = None) -> None:
        self._forms: dict[str, StockForm | str] = {}
        self._names: ModelNames | None = None
        if config is None:
            return
        model = skeleton(config)
        self._kind, self._names = type(model).__name__, ModelNames(model)
        for site in find_experts(model, weightless=True):
            self._forms[site.name] = _stock_form(site.form, site.experts)

    def of(self, experts: str) -> StockForm:
        """Of a layer.

        Args:
            experts: Full name of its experts module.

        Raises:
            KTAMXError: Stock PEFT cannot hold LoRA of its own for each of these experts.
        """
        form = self._forms.get(experts, PLAIN)
        if isinstance(form, str):
            raise KTAMXError(f"{experts}: {form}. {_INSTEAD}")
        return form

    def check_names(self, modules: Mapping[str, Any]) -> None:
        """Refuse modules that stock PEFT does not find again: it puts transformers' renamings on an adapter's keys.

        Args:
            modules: By full names; the values do not matter.

        Raises:
            KTAMXError: Naming the first, and what it becomes.
        """
        for module in modules if self._names else ():
            assert self._names
            renamed = self._names.renamed(f"{module}.lora_A.weight").removesuffix(".lora_A.weight")
            if renamed != module:
                raise KTAMXError(
                    f"{module}: stock PEFT looks for its LoRA at {renamed}, by transformers' renamings for "
                    f"{self._kind}, and does not find its own adapters of this model either. {_INSTEAD}"
                )


def stock_forms(base: Any, named: Any = None) -> StockForms:
    """Of a base model; every layer is taken for a plain one if neither is known, or it is no model of transformers.

    Args:
        base: Its folder or configuration.
        named: The base model's name in an adapter's settings, looked for on this machine alone.
    """
    from transformers import AutoConfig, PreTrainedConfig

    place = base if base is not None else named
    if place is None:
        return StockForms()
    try:
        config = place if isinstance(place, PreTrainedConfig) else AutoConfig.from_pretrained(place, **_LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return StockForms()
    try:
        return StockForms(config)
    except KTAMXModelNotSupportedError:  # with experts in a list, or none
        return StockForms()


def _stock_form(form: Form, experts: Any) -> StockForm | str:
    if form.flat:
        return "stock PEFT has one LoRA for all experts of a stack in two dimensions, not one for each"
    if form.call == "listed":
        return PLAIN
    first = "gate_up_proj" if form.gate.gated else "up_proj"
    exchanged = form.transposed and not getattr(experts, "is_transposed", False)
    return StockForm(first, exchanged, form.interleaved, len(getattr(experts, first)) - form.num_experts)
