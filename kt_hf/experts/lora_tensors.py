"""The LoRA of a layer in both directions.

From the adapters' parameters to the six tensors a backend takes, and from the gradients of those six tensors to the
gradients of the parameters.

A backend knows one LoRA of one rank on all three projections. Adapters may be several, of unlike ranks, on some
projections alone: they lie side by side along the rank, what is missing is zero, and scalings are folded into B.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Gradients
from ..backends.buffer_pool import empty
from ..backends.transfer import Arriving, flat_lora, lora_b_part, split_lora, to_device
from ..shapes import ExpertShape
from .lora_delivery import Delivery, delivered
from .projections import ExpertProjection

_optimizer_steps = itertools.count(1)
_optimizer_epoch = 0
_serials = itertools.count(1)


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_epoch
    _optimizer_epoch = next(_optimizer_steps)


def optimizer_steps() -> int:
    """Steps that optimizers of this process have taken since `watch_optimizers`."""
    return _optimizer_epoch


def watch_optimizers() -> None:
    """Count the steps of all optimizers, once a process: fused ones change tensors without raising their `_version`.

    A step of any optimizer in the process makes every layer copy its LoRA again: that costs a copy, not correctness.
    """
    if not getattr(watch_optimizers, "handle", None):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        watch_optimizers.handle = register_optimizer_step_post_hook(_count_optimizer_step)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One adapter's LoRA on one projection, and where it lies in the six tensors.

    Attributes:
        a: [E, rank, in].
        b: [E, out, rank].
        index: Of A among the six tensors (0, 2 or 4); B is the next.
        offset: First row along the six tensors' rank.
        rank: Of this adapter on this projection.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a: nn.Parameter
    b: nn.Parameter
    index: int
    offset: int
    rank: int
    scaling: float

    @property
    def place(self) -> tuple[int, int, int, float]:
        """Index, offset, rank and scaling: where the tensors lie and how they count."""
        return self.index, self.offset, self.rank, self.scaling


class LoraTensors:
    """The active adapters of a layer, as they are now.

    Args:
        projections: The layer's gate, up and down projection; without a gate up and down.
        shape: Sizes of the layer's experts.
        gradient_scale: What gradients are multiplied by: 1 / N where each of N ranks owns a part of the experts, whose
            gradients sum over all ranks' tokens, while those of other parameters are the ranks' mean.
    """

    def __init__(
        self, projections: Sequence[ExpertProjection], shape: ExpertShape, gradient_scale: float = 1.0
    ) -> None:
        self.shape = shape
        self.gradient_scale = gradient_scale
        self.parts: list[LoraPart] = []
        self._delivery: Delivery | None = None
        for index, projection in enumerate(projections):
            offset = 0
            for adapter in projection.computed_adapters:
                rank = projection.r[adapter]
                a, b = projection.tensors(adapter)
                self.parts.append(LoraPart(a, b, 2 * index, offset, rank, float(projection.scaling[adapter])))
                offset += rank

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each part in turn: the order of `gradients`."""
        return [tensor for part in self.parts for tensor in (part.a, part.b)]

    def inputs(self, from_gpu: bool) -> list[Tensor]:
        """`parameters` as the inputs that autograd sees of a forward.

        Args:
            from_gpu: Whether a GPU may compute their gradients. Those of parameters on the CPU are then only on their
                way when the layer's backward ends (`deliver`).
        """
        parameters = self.parameters
        if not from_gpu or any(parameter.device.type != "cpu" for parameter in parameters):
            return list(parameters)
        self._delivery = Delivery()
        return delivered(parameters, self._delivery)

    def deliver(self, arriving: Arriving, error: Callable[[], Exception]) -> list[Tensor]:
        """Gradients of `parameters` that are being copied to the CPU, for autograd to take.

        Not to be read: they have arrived when autograd passes them on to the parameters.

        Args:
            arriving: The gradients, and last a bool tensor [] that says whether they are finite.
            error: Makes the exception to raise if they are not.
        """
        if self._delivery is not None:
            return self._delivery.begin(arriving, error)
        *gradients, passed = arriving.wait()
        if not passed:
            raise error()
        return gradients

    @property
    def rank(self) -> int:
        """The six tensors' rank; 0 without an adapter."""
        return max((part.offset + part.rank for part in self.parts), default=0)

    def key(self, explicit_updates: int) -> Hashable:
        """A value that changes whenever the parameters' values may have changed.

        That is: parameters replaced or written to, an optimizer's step, or a call of `update_lora_pointers`.

        Args:
            explicit_updates: Calls of `update_lora_pointers` so far.
        """
        if not self.parts:
            return ()
        tensors = tuple((_serial(t), t.data_ptr(), t.dtype, _version(t)) for t in self.parameters)
        return _optimizer_epoch, explicit_updates, tensors, tuple(part.place for part in self.parts)

    def stacked(self, device: torch.device) -> tuple[Tensor, ...]:
        """The six tensors a backend takes, in the order and shape of `ExpertShape.lora_shapes`; () without an adapter.

        Args:
            device: Where the rest of the layer is. On a GPU scaling and rounding take no time, so parameters in pinned
                memory are brought there; others stay where they are.
        """
        rank = self.rank
        if rank == 0:
            return ()
        if self._one_adapter_of(rank):  # no copies
            pairs = ((_brought(part.a, device), _brought(part.b, device) * part.scaling) for part in self.parts)
            return tuple(itertools.chain.from_iterable(pairs))
        memory = self.parts[0].a.device
        stacked = tuple(torch.zeros(size, dtype=torch.float32, device=memory) for size in self.shape.lora_shapes(rank))
        for part in self.parts:
            rows = slice(part.offset, part.offset + part.rank)
            stacked[part.index][:, rows].copy_(part.a.detach())
            stacked[part.index + 1][:, :, rows].copy_(part.b.detach() * part.scaling)
        return stacked

    def gradients(self, computed: Gradients) -> list[Tensor]:
        """Gradients of `parameters`, in their order, from the gradients that a backend computed.

        Nothing else uses their memory, which may be one block for all of them. They are in fp32, unless the backend's
        are of the parameters' one dtype: nothing is to be gained then, for the scaling is multiplied in fp32 anyway and
        rounded.

        Args:
            computed: The backend's, with LoRA's: six tensors [E, r, in] and [E, out, r] on any device.
        """
        grads = computed.lora
        dtypes = {tensor.dtype for tensor in self.parameters}
        target = grads[0].dtype if dtypes == {grads[0].dtype} else torch.float32
        reusable = computed.lora_is_free and grads[0].dtype == target
        if self._one_adapter_of(grads[0].shape[1]):
            return self._for_ranks(_of_one_adapter(grads, [part.scaling for part in self.parts], target, reusable))
        reusable = reusable and flat_lora(grads) is None  # a part of their memory would keep all of it
        gradients: list[Tensor] = []
        for part in self.parts:
            rows = slice(part.offset, part.offset + part.rank)
            for narrow in (grads[part.index][:, rows], grads[part.index + 1][:, :, rows]):
                if reusable and narrow.is_contiguous():
                    gradients.append(narrow)
                else:
                    gradients.append(empty(tuple(narrow.shape), target, narrow.device).copy_(narrow))
            if part.scaling != 1.0:
                gradients[-1].mul_(part.scaling)
        return self._for_ranks(gradients)

    def _for_ranks(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.gradient_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(self.gradient_scale)
        return gradients

    def constant_gradients(self, value: float) -> list[Tensor]:
        """Gradients of `parameters` where none were computed, in fp32 on the parameters' devices.

        Args:
            value: Of every element: 0 for a batch of no tokens, NaN if the gradient that came in was not finite.
        """
        return [torch.full(p.shape, value, dtype=torch.float32, device=p.device) for p in self.parameters]

    def _one_adapter_of(self, rank: int) -> bool:
        """Whether each projection has one adapter of this rank: the backend's tensors are its parameters then."""
        one_each = len(self.parts) == len(self.shape.projections)
        return one_each and all(part.rank == rank and part.offset == 0 for part in self.parts)


def _of_one_adapter(
    grads: tuple[Tensor, ...], scalings: list[float], target: torch.dtype, reusable: bool
) -> list[Tensor]:
    """Gradients of one adapter of the backend's rank on all projections: in as few passes as can be."""
    flat = flat_lora(grads)
    if reusable and all(tensor.is_contiguous() for tensor in grads):
        gradients = grads
    elif flat is None:
        gradients = tuple(empty(tuple(tensor.shape), target, tensor.device).copy_(tensor) for tensor in grads)
    else:
        flat = empty(tuple(flat.shape), target, flat.device).copy_(flat)
        gradients = split_lora(flat, [tensor.shape for tensor in grads])
    if flat is not None and len(set(scalings)) == 1:
        _scale(lora_b_part(flat, grads), scalings[0])
    else:
        for b, scaling in zip(gradients[1::2], scalings, strict=True):
            _scale(b, scaling)
    return list(gradients)


def _scale(b: Tensor, scaling: float) -> None:
    if scaling != 1.0:
        b.mul_(scaling)


def _brought(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """The parameter's values on a GPU, if `device` is one and they get there fast; else where they are."""
    quick = device.type == "cuda" and parameter.is_pinned()
    return to_device(parameter.detach(), device) if quick else parameter.detach()


def _serial(parameter: nn.Parameter) -> int:
    """A number that no other parameter gets: `id` and address are given again to the next one when it is replaced.

    An attribute on the parameter: PyTorch's dictionary with weak keys takes seven times as long (12 us a look-up).
    """
    if not hasattr(parameter, "_kt_serial"):
        parameter._kt_serial = next(_serials)  # type: ignore[attr-defined]
    return int(parameter._kt_serial)  # type: ignore[attr-defined]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def digest(tensor: Tensor) -> int:
    """A number that tells a tensor's values from others'; 0 where they are zero, as at the start of an adapter."""
    values = tensor.detach().flatten()[:4096].float().cpu()
    if not bool(values.any()):
        return 0
    return int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:7], "little")
