"""The PEFT layers of `KTExperts`: the gate, up and down projection of all experts, and the holders of their LoRA."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import Tensor, nn

from ..errors import KTAMXConfigError, KTAMXError
from ..ranks import Share
from .holders import ExpertLora, PackedWeight

logger = logging.getLogger(__name__)

NO_MERGE = (
    "The experts' weights are packed for the CPU operators: LoRA cannot be merged into them in place, and the adapter "
    "cannot be unloaded from them. Save the adapter with save_pretrained, then: kt-hf export ADAPTER OUT --to merged "
    "--base BASE_MODEL."
)
NO_COPY = (
    "A patched model cannot be deep-copied: its experts are packed for the CPU operators. For DPO's reference use the "
    "adapter switched off (ref_model=None), else load and patch the model a second time."
)
NO_PICKLE = (
    "A patched model cannot be pickled: its experts are packed for the CPU operators. Save the adapter with "
    "save_pretrained, and load and patch the base model in the other process."
)


class ProjectionOwner(Protocol):
    """What a projection asks of the layer it belongs to.

    Attributes:
        label: The layer's name in the model, for messages.
        lora_dtype: Dtype of new LoRA tensors.
    """

    label: str
    lora_dtype: torch.dtype

    def lora_on_gpu(self, rank: int) -> bool:
        """Whether LoRA parameters move to a GPU with the model.

        Args:
            rank: Of the adapter whose tensors are made.
        """

    @property
    def device(self) -> torch.device:
        """The device of the model around the layer."""

    def check_rank(self, rank: int, where: str) -> None:
        """Refuse a LoRA rank that the layer's operators have no room for.

        Args:
            rank: LoRA rank of an adapter.
            where: The projection's name, for the message.

        Raises:
            KTAMXConfigError: The rank is refused.
        """

    def warn_dropout(self, dropout: float) -> None:
        """Say once a model that experts train without LoRA dropout."""


class ExpertProjection(nn.Module, LoraLayer):
    """The gate, up or down projection of all experts of a layer, as PEFT sees it.

    Has no weight of its own: PEFT creates, names, saves, loads, switches and freezes its LoRA tensors, `KTExperts`
    computes with them. Supported are LoRA and rsLoRA with the initializations True, False and "gaussian"; the rest is
    refused.

    Args:
        num_experts: E.
        in_features: Columns of an expert's matrix.
        out_features: Rows of an expert's matrix.
        owner: The layer that the projection belongs to; held weakly.
        share: The experts whose LoRA this process holds, where ranks divide them.
    """

    # Set by LoraLayer; declared because nn.Module's attributes have no types of their own.
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_dropout: nn.ModuleDict
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        owner: ProjectionOwner,
        share: Share | None = None,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, PackedWeight(in_features, out_features))
        self.num_experts = num_experts
        self.share = share
        self.in_features = in_features
        self.out_features = out_features
        # Weakly: the weights of a deleted model go at once, without waiting for the garbage collector.
        self._owner = weakref.ref(owner)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Make the LoRA tensors of an adapter. PEFT calls this for each adapter that targets the projection.

        Args:
            adapter_name: The adapter's name.
            r: Its LoRA rank on this projection.
            lora_alpha: Scaling is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
            config: The adapter's configuration.
            **kwargs: PEFT's other arguments; of them `target_name` is used, for messages.

        Raises:
            KTAMXConfigError: A setting that experts cannot have, or a rank the operators have no room for.
        """
        owner = self._owner()
        assert owner is not None, "a projection outlives its layer"
        where = f"{owner.label}.{kwargs.get('target_name', '').rsplit('.', 1)[-1] or 'projection'}"
        refuse_variants(config, where)
        self.check_rank(r, where)
        if config.lora_dropout:
            owner.warn_dropout(config.lora_dropout)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Identity()
        dtype, gpu = owner.lora_dtype, owner.lora_on_gpu(r)
        count = self.num_experts if self.share is None else self.share.count
        shape_a, shape_b = (count, r, self.in_features), (count, self.out_features, r)
        self.lora_A[adapter_name] = ExpertLora(torch.empty(shape_a, dtype=dtype, device="cpu"), gpu, self.share)
        self.lora_B[adapter_name] = ExpertLora(torch.zeros(shape_b, dtype=dtype, device="cpu"), gpu, self.share)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if owner.device.type == "cuda":  # the model has been moved already: `.to()` may not come again
            self.lora_A[adapter_name].to(owner.device)
            self.lora_B[adapter_name].to(owner.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def check_rank(self, rank: Any, where: str) -> None:
        """Refuse a rank that is no positive integer, or that the packed operators have no room for.

        Args:
            rank: LoRA rank of an adapter.
            where: The projection's name, for the message.

        Raises:
            KTAMXConfigError: The rank is refused.
        """
        if not isinstance(rank, int) or rank < 1:
            raise KTAMXConfigError(f"{where}: LoRA rank {rank!r} (r, rank_pattern) is not a positive integer.")
        owner = self._owner()
        if owner is not None:
            owner.check_rank(rank, where)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after it has replaced the tensors, by some of another device perhaps: to where they live."""
        owner = self._owner()
        for holder in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if holder.weight.is_meta:
                continue
            if not holder.follow_to_gpu:
                holder.weight.data = holder.weight.data.cpu()
            elif owner is not None:
                holder.to(owner.device)

    def place_lora(self, gpu: torch.device | None) -> None:
        """Move all adapters' tensors to a GPU, where they follow the model from now on, or back to the CPU.

        Args:
            gpu: The GPU; None for the CPU.
        """
        for holder in (*self.lora_A.values(), *self.lora_B.values()):
            assert isinstance(holder, ExpertLora)
            holder.follow_to_gpu = gpu is not None
            holder.weight.data = holder.weight.data.to(gpu or "cpu")
            if holder.weight.grad is not None:
                holder.weight.grad = holder.weight.grad.to(gpu or "cpu")

    @property
    def computed_adapters(self) -> list[str]:
        """Names of the active adapters that have LoRA on this projection; [] while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.r]

    def tensors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [E, r, in] and B [E, out, r] of an adapter."""
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        assert isinstance(a, nn.Parameter)
        assert isinstance(b, nn.Parameter)
        return a, b

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Give an adapter's tensors their first values, as PEFT does for a linear layer, expert by expert.

        Args:
            adapter_name: The adapter's name.
            init_lora_weights: True draws A uniform in ±1/sqrt(in) and makes B zero; "gaussian" draws A normal with
                standard deviation 1/r; False draws B too, uniform in ±1/sqrt(r).
        """
        a, b = self.tensors(adapter_name)
        if a.is_meta:
            return
        with torch.no_grad():
            if str(init_lora_weights).lower() == "gaussian":
                std = 1 / self.r[adapter_name]
                self._draw(a, lambda values: values.normal_(std=std))
            else:
                self._draw(a, _uniform(1 / math.sqrt(self.in_features)))
            if init_lora_weights is False:  # as nn.Linear's own start, which is what PEFT leaves then
                self._draw(b, _uniform(1 / math.sqrt(self.r[adapter_name])))
            else:
                b.zero_()

    def _draw(self, values: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        """Draw a tensor's values; where ranks divide the experts, those of all, as one process does, to keep a part.

        So every rank's random numbers go on alike, and a run starts with the same values for any number of ranks.
        """
        if self.share is None:
            draw(values)
        else:
            values.copy_(draw(values.new_empty(self.share.total, *values.shape[1:]))[self.share.experts])

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused (KTAMXError): a projection is not computed by itself."""
        raise KTAMXError("An expert projection is not called by itself: KTExperts computes the three together.")

    def _no_merge(self, *_: Any, **__: Any) -> NoReturn:
        raise KTAMXError(NO_MERGE)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise KTAMXError(NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KTAMXError(NO_PICKLE)

    merge = _no_merge

    def unmerge(self) -> None:
        """Nothing is ever merged, so there is nothing to undo: `unmerge_adapter` of the model works."""

    get_delta_weight = _no_merge
    unload_and_optionally_merge_module = _no_merge


def _uniform(bound: float) -> Callable[[Tensor], Tensor]:
    return lambda values: values.uniform_(-bound, bound)


def refuse_variants(config: LoraConfig, where: str) -> None:
    """Refuse what changes a LoRA layer's mathematics and is not implemented for experts.

    Args:
        config: An adapter's configuration.
        where: The projection's name, for the message.

    Raises:
        KTAMXConfigError: Naming the setting and its value.
    """
    tagged = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    settings = ("lora_bias", "use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "kasa_config",
                "velora_config", "monteclora_config", "use_bdlora", *tagged)  # fmt: skip
    for name in settings:
        if getattr(config, name, None):
            raise KTAMXConfigError(
                f"{where}: {name}={getattr(config, name)!r} is not supported on experts. Leave it out, or take "
                "gate_proj, up_proj and down_proj out of target_modules."
            )
    init = config.init_lora_weights
    if not isinstance(init, bool) and str(init).lower() != "gaussian":
        raise KTAMXConfigError(
            f"{where}: init_lora_weights={init!r} is not supported on experts; use True or 'gaussian'."
        )
