"""`KTExperts`, the module that stands in a patched model's `experts`, and its three PEFT layers."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import CALL_LOCK, ExpertsBackend, ExpertWeights, PackedLayerFiles, TorchBackend
from ..backends.transfer import pin
from ..errors import KTAMXConfigError, KTAMXError
from ..ranks import Kind, Ranks, Share
from ..shapes import ExpertShape
from .exchange import DIVIDED, LayerExchange
from .factory import BackendFactory
from .function import ExpertsFunction, forward_only
from .input_checks import check_inputs
from .lora_tensors import LoraTensors
from .projections import NO_COPY, NO_PICKLE, ExpertProjection
from .runner import ExpertsRunner
from .tickets import in_backward

WRAPPERS = "_kt_wrappers"  # attribute of a patched model: its `KTExperts` in layer order


class KTExperts(nn.Module):
    """The routed experts of one layer, computed by a backend. Takes the place of a model's `experts` module.

    Args:
        weights: Taken over: gate_up [E, 2I, H] and down [E, H, I], and biases if any. Packed files and 8-bit weights
            are packed at once, for the rank of the factory; others when the LoRA rank is known. Of the owned experts
            only, if there is a `share`; but for down_bias, which is of all.
        shape: Sizes of the layer, of all its experts.
        layer_idx: Index among the model's layers.
        label: Full name in the model, for messages.
        factory: Builds the backends of all layers of a model.
        fingerprint: [4] int64 that tell this layer's base weights from others'.
        share: The experts that this process owns, where they are divided among ranks.
        ranks: The processes that they are divided among.

    Attributes:
        lora_dtype: Dtype of new LoRA tensors.
        exchange: What the layer exchanges with the other ranks; None in a run of one process.
        down_bias: Biases of the down projections, [E, H]; None without.
    """

    down_bias: Tensor | None

    def __init__(
        self,
        weights: ExpertWeights | PackedLayerFiles,
        shape: ExpertShape,
        layer_idx: int,
        label: str,
        factory: BackendFactory,
        fingerprint: Tensor,
        share: Share | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.share = share
        self.exchange: LayerExchange | None = None
        if share is not None and ranks is not None:
            self.exchange = LayerExchange(ranks, share, layer_idx, label)
            DIVIDED.add(self)
        self.layer_idx = layer_idx
        self.label = label
        self.factory = factory
        self.lora_dtype = torch.bfloat16 if isinstance(weights, PackedLayerFiles) else weights.gate_up.dtype
        for name in shape.projections:
            inside, outside = shape.hidden_size, shape.intermediate_size
            sizes = (outside, inside) if name == "down_proj" else (inside, outside)
            self.add_module(name, ExpertProjection(shape.num_experts, *sizes, self, share))
        self._explicit_updates = 0  # calls of update_lora_pointers
        # The weights are no state of the module, yet two models that differ in them alone must not look the same: TRL
        # keys precomputed reference log-probabilities by the state dict.
        self.register_buffer("base_fingerprint", fingerprint)
        down_bias = weights.down_bias if isinstance(weights, ExpertWeights) else None
        self.register_buffer("down_bias", down_bias, persistent=False)
        self._unpacked: ExpertWeights | None = None
        if isinstance(weights, PackedLayerFiles) or weights.low_bit is not None:
            with CALL_LOCK:
                backend = factory.build(weights, self.owned_shape, factory.rank or 0, label, layer_idx)
                self._runner = self._new_runner(backend)
            return
        # Until the LoRA rank is known: PyTorch on the weights as they are.
        self._unpacked = weights
        self._runner = self._new_runner(TorchBackend(weights, self.owned_shape))

    def _new_runner(self, backend: ExpertsBackend) -> ExpertsRunner:
        return ExpertsRunner(
            backend, self.label, self.factory.retains(self.layer_idx), self.factory.checks, self.factory.make_room
        )

    def keep_activations(self, keep: bool) -> None:
        """Whether a forward is kept for the recompute of checkpointing, from the next one on."""
        self._runner.retain = keep

    @property
    def owned_shape(self) -> ExpertShape:
        """Sizes of the part of the layer that this process computes: all of it, unless ranks divide its experts."""
        if self.share is None:
            return self.shape
        return replace(self.shape, num_experts=self.share.count, ranks=self.share.ranks)

    def _lora(self) -> LoraTensors:
        scale = 1.0 if self.share is None else 1 / self.share.ranks
        return LoraTensors(self.projections, self.owned_shape, scale)

    @property
    def projections(self) -> list[ExpertProjection]:
        """The gate, up and down projection, in this order; up and down of experts without a gate."""
        return [getattr(self, name) for name in self.shape.projections]

    @property
    def backend(self) -> ExpertsBackend:
        """The backend that computes the layer now; before packing, PyTorch's."""
        return self._runner.backend

    @property
    def backend_name(self) -> str:
        """`AMXBF16`, `torch`, or `torch` for the time before packing."""
        return self.backend.name

    @property
    def packed(self) -> bool:
        """Whether the weights are where they will stay."""
        return self._unpacked is None

    @property
    def lora_params(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters, gate_lora_a … down_lora_b; {} without one, fewer if it has fewer."""
        params: dict[str, nn.Parameter] = {}
        for projection, name in zip(self.projections, self.shape.projections, strict=True):
            for adapter in projection.computed_adapters:
                short = name.removesuffix("_proj")
                params[f"{short}_lora_a"], params[f"{short}_lora_b"] = projection.tensors(adapter)
        return params

    def lora_on_gpu(self, rank: int) -> bool:
        """Whether the LoRA parameters, of an adapter of this rank, move to a GPU with the model."""
        return self.factory.lora_on_gpu(rank, self.layer_idx)

    @property
    def device(self) -> torch.device:
        """The device of the model around this layer, where its inputs come from."""
        return next(self.buffers()).device

    def warn_dropout(self, dropout: float) -> None:
        """Say once a model that experts train without LoRA dropout."""
        self.factory.warn_dropout(dropout)

    def check_rank(self, rank: int, where: str) -> None:
        """Refuse an adapter that the operators have no room for.

        Args:
            rank: LoRA rank of the adapter.
            where: The projection's name, for the message.

        Raises:
            KTAMXConfigError: The rank is larger than the one the experts are packed for.
        """
        most = self.backend.max_rank if self.packed else self.factory.max_rank
        if most is not None and rank > most:
            raise KTAMXConfigError(
                f"{where}: LoRA rank {rank} is larger than the {most} the experts are packed for. "
                f"Patch with KTConfig(kt_lora_rank={rank}) or more."
            )

    def pack(self) -> None:
        """Build the backend, if the LoRA rank is known (by `kt_lora_rank` or an adapter) and it is not built yet."""
        if self._unpacked is None:
            return
        rank = self.factory.rank
        if rank is None:
            rank = max((r for projection in self.projections for r in projection.r.values()), default=0)
            if rank == 0:
                return
        with CALL_LOCK:
            if self._unpacked is None:  # another thread was faster
                return
            # An interruption leaves the layer unpacked, to be packed at the next call.
            backend = self.factory.build(self._unpacked, self.owned_shape, rank, self.label, self.layer_idx)
            self._runner, self._unpacked = self._new_runner(backend), None

    def take_load(self) -> tuple[int, Tensor]:
        """Tokens that gradients were computed for since the last call, and how many each expert got, [E] int64, CPU.

        Where ranks divide the experts these are all ranks' tokens, and all ranks call it together.
        """
        tokens, load = self._runner.load.take()
        if self.exchange is None:
            return tokens, load
        return self.exchange.joined_tokens(tokens), self.exchange.joined_load(load)

    def forget_recompute(self) -> None:
        """Let go what a backward that failed, for want of memory perhaps, has left of the layer in memory."""
        self._runner.forget_recompute()

    def update_lora_pointers(self) -> None:
        """Copy the LoRA parameters to the backend, whether or not they look changed.

        Needed after values were written to `parameter.data`, which nothing else notices.
        """
        update_lora([self])

    def _begin_update(self) -> None:
        self.pack()
        self._explicit_updates += 1
        if self.device.type == "cuda":
            for parameter in self.lora_params.values():
                pin(parameter)
        lora = self._lora()
        self._begin_load(lora, lora.key(self._explicit_updates))

    def _begin_load(self, lora: LoraTensors, key: Hashable) -> None:
        from_host = any(not parameter.is_cuda for parameter in lora.parameters)
        self._runner.begin_load(key, lambda: lora.stacked(self.device), from_host)

    # torch.compile must not look inside: it would hand pointers of its own buffers to the operators, which crashes. The
    # graph breaks here.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs.

        Args:
            hidden_states: [T, H], any floating dtype and device.
            top_k_index: [T, K] integers. Ids outside [0, E) mean no expert.
            top_k_weights: [T, K], floating.

        Returns:
            [T, H], in hidden_states' dtype and on its device. The inputs are never written to.

        Raises:
            KTAMXForwardError: A wrong shape or dtype, or an output that is not finite; where ranks divide the experts,
                also another rank that has failed, ended or is elsewhere.
        """
        with self.telling(Kind.TOKENS):
            lora = self._prepared(hidden_states, top_k_index, top_k_weights)
        parameters = lora.parameters
        if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, top_k_weights, *parameters)):
            if self.exchange is not None:
                self.exchange.check_owners([p.tensors(name)[0] for p in self.projections for name in p.r])
            inputs = lora.inputs(from_gpu=hidden_states.is_cuda or self._runner.on_gpu)
            out = ExpertsFunction.apply(
                hidden_states, top_k_index, top_k_weights, self._runner, lora, self.exchange, *inputs
            )
        else:
            out = forward_only(self._runner, self.exchange, hidden_states, top_k_index, top_k_weights)
        if self.down_bias is None:
            return out
        # Once, by each token's own rank: not what ranks sum.
        return out + _weighted_biases(self.down_bias, top_k_index, top_k_weights).to(out.dtype)

    def telling(self, kind: Kind) -> contextlib.AbstractContextManager[None]:
        """While this is open, other ranks are told of an error, which they would wait for; alone there is nobody."""
        return contextlib.nullcontext() if self.exchange is None else self.exchange.telling(kind)

    def _prepared(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> LoraTensors:
        """Check a forward's inputs, and have the backend hold the LoRA values of now."""
        check_inputs(self.label, self.shape, hidden_states, top_k_index, top_k_weights)
        self.pack()
        lora = self._lora()
        key = lora.key(self._explicit_updates)
        if key != self._runner.lora_key:
            self._begin_load(lora, key)
            self._runner.finish_load()
        if not in_backward():
            gradients = torch.is_grad_enabled() and hidden_states.requires_grad
            self.factory.begins(self.layer_idx, hidden_states.shape[0], gradients, self.training)
        return lora

    def extra_repr(self) -> str:
        """Sizes and backend, for `print(model)`."""
        s = self.shape
        return (
            f"layer_idx={self.layer_idx}, experts={s.num_experts}, top_k={s.top_k}, hidden={s.hidden_size}, "
            f"intermediate={s.intermediate_size}, backend={self.backend_name}"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise KTAMXError(NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KTAMXError(NO_PICKLE)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise KTAMXConfigError(
            "nn.DataParallel cannot replicate experts that live on the CPU. "
            "Show the process one GPU: CUDA_VISIBLE_DEVICES=0."
        )


def kt_layers(model: nn.Module) -> list[KTExperts]:
    """All `KTExperts` of a model (or a wrapper of one), in layer order, each once.

    A patched model knows its own, if none was taken out: with 48 layers a walk through its modules takes 20 ms, some of
    them in each step.
    """
    found: dict[KTExperts, None] = {}
    left, seen = [model], set[nn.Module]()  # a wrapper may hold a model twice, or itself
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, KTExperts):
            found[module] = None
        elif _all_there(module, known := module.__dict__.get(WRAPPERS, ())):
            found |= dict.fromkeys(known)
        else:
            left += reversed(list(module.children()))
    return list(found)


def _all_there(model: nn.Module, layers: Sequence[KTExperts]) -> bool:
    """Whether a model has layers that it was patched with, all where they were: some may have been taken out since."""
    try:
        return bool(layers) and all(model.get_submodule(layer.label) is layer for layer in layers)
    except AttributeError:
        return False


def update_lora(layers: Sequence[KTExperts]) -> None:
    """`update_lora_pointers` of several layers, with one wait for all, after which parameters may be written to."""
    begun: list[KTExperts] = []
    try:
        for layer in layers:
            begun.append(layer)
            layer._begin_update()
    finally:
        for layer in begun:
            layer._runner.finish_load()


def _weighted_biases(biases: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The biases [E, H] of the down projections, which backends leave out: the weighted sum of each token's, [T, H]."""
    none = (ids < 0) | (ids >= len(biases))
    by_expert = weights.new_zeros(len(ids), len(biases))
    by_expert = by_expert.scatter_add(1, ids.long().masked_fill(none, 0), weights.masked_fill(none, 0))
    return by_expert.to(biases.dtype) @ biases
