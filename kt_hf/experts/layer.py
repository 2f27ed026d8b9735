"""`KTExperts`, the module that stands in a patched model's `experts`, and its three PEFT layers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import CALL_LOCK, ExpertsBackend, ExpertShape, ExpertWeights, Gradients, SavedLayer, TorchBackend
from ..backends.transfer import pin, to_device
from ..checkpoint.fingerprint import combined, marks_of_weights
from ..errors import KTAMXConfigError, KTAMXError, KTAMXForwardError

if TYPE_CHECKING:
    from ..placement.packer import Packer

from .function import ExpertsFunction
from .lora_tensors import parameter_gradients
from .projections import NO_COPY, NO_PICKLE, PROJECTIONS, ExpertProjection
from .runner import ExpertsRunner

logger = logging.getLogger(__name__)

Part = tuple[nn.Parameter, nn.Parameter, int, int, int, float]  # see KTExperts._lora_parts

_optimizer_steps = itertools.count(1)
_serials = itertools.count(1)
_optimizer_epoch = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_epoch
    _optimizer_epoch = next(_optimizer_steps)


def watch_optimizers() -> None:
    """Count the steps of all optimizers, once a process: fused ones change tensors without raising their `_version`."""
    if not getattr(watch_optimizers, "handle", None):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        watch_optimizers.handle = register_optimizer_step_post_hook(_count_optimizer_step)  # type: ignore[attr-defined]


class KTExperts(nn.Module):
    """The routed experts of one layer, computed by a backend. Takes the place of a model's `experts` module.

    Args:
        weights: Taken over. Saved ones, and those of 8 bits, are packed at once, for the rank `kt_lora_rank`.
        shape: Sizes.
        layer_idx: Position among the model's layers.
        label: Full name in the model, for messages.
        packer: Shared by the layers of a model: the backend to build, and how.
    """

    def __init__(
        self, weights: ExpertWeights | SavedLayer, shape: ExpertShape, layer_idx: int, label: str, packer: Packer
    ) -> None:
        super().__init__()
        self.shape = shape
        self.layer_idx = layer_idx
        self.label = label
        self.packer = packer
        self.lora_dtype = torch.bfloat16 if isinstance(weights, SavedLayer) else weights.gate_up.dtype
        sizes = {
            "gate_proj": (shape.hidden_size, shape.intermediate_size),
            "up_proj": (shape.hidden_size, shape.intermediate_size),
            "down_proj": (shape.intermediate_size, shape.hidden_size),
        }
        for name, (inside, outside) in sizes.items():
            self.add_module(name, ExpertProjection(shape.num_experts, inside, outside, self))
        self._told_of_changes = 0  # calls of update_lora_pointers
        # The weights are no state of the module, yet two models that differ in them alone must not look the same: TRL
        # keys precomputed reference log-probabilities by the state dict.
        self.register_buffer("base_fingerprint", fingerprint(weights))
        self._unpacked: ExpertWeights | None = None
        if isinstance(weights, SavedLayer) or weights.scaled is not None:
            with CALL_LOCK:
                backend = packer.pack(weights, shape, packer.config.kt_lora_rank or 0, label, layer_idx)
            self._runner = ExpertsRunner(backend, label, packer.retain)
            return
        # Until the LoRA rank is known: PyTorch on the weights as they are.
        self._unpacked = weights
        self._runner = ExpertsRunner(TorchBackend(weights, shape), label, packer.retain)

    @property
    def projections(self) -> list[ExpertProjection]:
        return [getattr(self, name) for name in PROJECTIONS]

    @property
    def backend(self) -> ExpertsBackend:
        """What computes now."""
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
        found: dict[str, nn.Parameter] = {}
        for projection, name in zip(self.projections, ("gate", "up", "down"), strict=True):
            for adapter in _active(projection):
                found[f"{name}_lora_a"], found[f"{name}_lora_b"] = projection.tensors(adapter)
        return found

    def check_rank(self, rank: int, where: str) -> None:
        """Refuse an adapter the packed operators have no room for."""
        most = self.packer.config.kt_lora_rank if not self.packed else self._runner.backend.max_rank
        if self.packer.backend != "torch" and most is not None and rank > most:
            raise KTAMXConfigError(
                f"{where}: LoRA rank {rank} is larger than the {most} the experts are packed for. "
                f"Patch with KTConfig(kt_lora_rank={rank}) or more."
            )

    def pack(self) -> None:
        """Build the backend, if the LoRA rank is known (by `kt_lora_rank` or an adapter) and it is not built yet."""
        if self._unpacked is None:
            return
        rank = self.packer.config.kt_lora_rank
        if rank is None:
            rank = max((r for projection in self.projections for r in projection.r.values()), default=0)
            if rank == 0:
                return
        with CALL_LOCK:
            if self._unpacked is None:  # another thread was faster
                return
            # An interruption leaves the layer unpacked, to be packed at the next call.
            backend = self.packer.pack(self._unpacked, self.shape, rank, self.label, self.layer_idx)
            self._runner, self._unpacked = ExpertsRunner(backend, self.label, self.packer.retain), None

    def take_load(self) -> tuple[int, Tensor]:
        """Tokens that gradients were computed for since the last call, and how many each expert got, [E] int64, CPU."""
        runner = self._runner
        tokens, load = runner.tokens, runner.load.cpu().clone()
        runner.tokens = 0
        runner.load.zero_()
        return tokens, load

    def update_lora_pointers(self) -> None:
        """Copy the LoRA parameters to the backend, whether or not they look changed. Needed after a bare `.data`
        edit."""
        self.pack()
        self._told_of_changes += 1
        if self._home.type == "cuda":
            for parameter in self.lora_params.values():
                pin(parameter)
        self._runner.load_lora(_lora_key(self._lora_parts(), self._told_of_changes), self._lora_tensors)

    @property
    def _home(self) -> torch.device:
        """Where the rest of the layer is."""
        return next(self.buffers()).device

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
            KTAMXForwardError: A wrong shape or dtype, or an output that is not finite.
        """
        self._check(hidden_states, top_k_index, top_k_weights)
        self.pack()
        parts = self._lora_parts()
        key = _lora_key(parts, self._told_of_changes)
        if key != self._runner.lora_key:
            self._runner.load_lora(key, self._lora_tensors)
        lora = [tensor for part in parts for tensor in part[:2]]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, top_k_weights, *lora)):
            made = [(axis, offset, rank, scaling) for _, _, axis, offset, rank, scaling in parts]
            dtypes = {tensor.dtype for tensor in lora}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

            def to_parameters(gradients: Gradients) -> list[Tensor]:
                return parameter_gradients(gradients, made, dtype)

            return ExpertsFunction.apply(hidden_states, top_k_index, top_k_weights, self._runner, to_parameters, *lora)
        out, _ = self._runner.forward(hidden_states, top_k_index, top_k_weights, save=False)
        return out.to(hidden_states.dtype)

    def _check(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        problem = None
        if x.dim() != 2 or x.shape[1] != self.shape.hidden_size or not x.is_floating_point():
            problem = (
                f"hidden_states is {x.dtype}, {tuple(x.shape)}; it must be floating, [T, {self.shape.hidden_size}]"
            )
        elif ids.shape != weights.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
            problem = (
                f"top_k_index is {tuple(ids.shape)} and top_k_weights {tuple(weights.shape)}; both must be "
                f"[{x.shape[0]}, K]"
            )
        elif ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not weights.is_floating_point():
            problem = f"top_k_index is {ids.dtype}, top_k_weights {weights.dtype}; they must be integer and floating"
        elif ids.shape[1] > self.shape.top_k:
            problem = (
                f"top_k_index sends a token to {ids.shape[1]} experts, but the model's config says {self.shape.top_k} "
                "(num_experts_per_tok): set it before apply_kt_moe"
            )
        elif x.is_cuda and torch.cuda.is_current_stream_capturing():
            problem = "experts on the CPU cannot be captured in a CUDA graph: switch CUDA graphs off"
        if problem:
            raise KTAMXForwardError(f"{self.label}: {problem}.")

    def _lora_parts(self) -> list[Part]:
        """Of each projection and active adapter: A, B, index of A among the six, first row, rank, scaling."""
        parts = []
        for index, projection in enumerate(self.projections):
            offset = 0
            for adapter in _active(projection):
                rank = projection.r[adapter]
                a, b = projection.tensors(adapter)
                parts.append((a, b, 2 * index, offset, rank, float(projection.scaling[adapter])))
                offset += rank
        return parts

    def _lora_tensors(self) -> tuple[Tensor, ...]:
        """The six tensors a backend takes: active adapters side by side along the rank, zero-padded, scaling in B."""
        parts = self._lora_parts()
        rank = max((offset + r for _, _, _, offset, r, _ in parts), default=0)
        if rank == 0:
            return ()
        if len(parts) == 3 and all(part[4] == rank for part in parts):  # one adapter, one rank: no copies
            pairs = ((self._at_home(a), self._at_home(b) * s) for a, b, _, _, _, s in parts)
            return tuple(itertools.chain.from_iterable(pairs))
        device = parts[0][0].device
        tensors = tuple(torch.zeros(size, dtype=torch.float32, device=device) for size in self.shape.lora_shapes(rank))
        for a, b, index, offset, r, scaling in parts:
            tensors[index][:, offset : offset + r].copy_(a.detach())
            tensors[index + 1][:, :, offset : offset + r].copy_(b.detach() * scaling)
        return tensors

    def _at_home(self, tensor: Tensor) -> Tensor:
        """On the GPU, where scaling and rounding take no time, if it gets there fast."""
        there = self._home.type == "cuda" and tensor.is_pinned()
        return to_device(tensor.detach(), self._home) if there else tensor.detach()

    def extra_repr(self) -> str:
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


def fingerprint(weights: ExpertWeights | SavedLayer) -> Tensor:
    """[4] int64 that tell a layer's base weights from others': the mark of a sample of them."""
    mark = weights.mark if isinstance(weights, SavedLayer) else combined(marks_of_weights(weights))
    return torch.frombuffer(bytearray.fromhex(mark), dtype=torch.int64).clone()


def _lora_key(parts: list[Part], told_of_changes: int) -> Hashable:
    """Changes whenever the LoRA values may have: parameters replaced, written to, or an optimizer's step."""
    if not parts:
        return ()
    tensors = tuple((_serial(t), t.data_ptr(), t.dtype, _version(t)) for part in parts for t in part[:2])
    return _optimizer_epoch, told_of_changes, tensors, tuple(part[2:] for part in parts)


def _active(projection: ExpertProjection) -> list[str]:
    if projection.disable_adapters:
        return []
    return [name for name in projection.active_adapters if name in projection.r]


def _serial(parameter: nn.Parameter) -> int:
    """A number of the parameter's own: `id` and address are given again to the next one when it is replaced."""
    if not hasattr(parameter, "_kt_serial"):
        parameter._kt_serial = next(_serials)  # type: ignore[attr-defined]
    return int(parameter._kt_serial)  # type: ignore[attr-defined]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def kt_layers(model: nn.Module) -> list[KTExperts]:
    """All `KTExperts` of a model (or a wrapper of one), in layer order."""
    return [module for module in model.modules() if isinstance(module, KTExperts)]


class LoraParamsView(Mapping[int, dict[str, nn.Parameter]]):
    """`model._kt_moe_lora_params`: layer index -> name -> Parameter, following the adapters; {} before the first."""

    def __init__(self, layers: list[KTExperts]) -> None:
        self._layers = layers

    def _current(self) -> dict[int, dict[str, nn.Parameter]]:
        return {layer.layer_idx: params for layer in self._layers if (params := layer.lora_params)}

    def __getitem__(self, layer: int) -> dict[str, nn.Parameter]:
        return self._current()[layer]

    def __iter__(self) -> Any:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def __repr__(self) -> str:
        return repr(self._current())

    def __eq__(self, other: object) -> bool:
        return self._current() == other

    __hash__ = None  # type: ignore[assignment]
