"""Results of a backend on their way back: sent where they are needed, and looked through for NaN and infinity.

What the CPU computed is looked through at once, by the CPU where it is small and by the GPU it is sent to where it is
large. What a GPU computed is looked through later (`DeferredChecks`), for nobody should wait for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Gradients
from ..backends.finite_checks import DeferredChecks, all_finite, is_finite, magnitudes
from ..backends.transfer import flat_lora, lora_to_device, to_device, to_host
from ..errors import KTAMXBackwardError, KTAMXForwardError
from .lora_tensors import LoraTensors

# Values of a result on the CPU that it looks through itself, at once: 20 us, and a GPU takes as long to be asked to.
_SMALL = 2**16
_LORA = "an expert LoRA tensor"


class CheckedGradients(NamedTuple):
    """Gradients that the CPU computed, looked through.

    Attributes:
        gradients: On the device of the layer's inputs; LoRA's may still be on the CPU.
        hidden_finite: Whether those of the hidden states are finite.
        weights_finite: Whether those of the routing weights are.
    """

    gradients: Gradients
    hidden_finite: bool
    weights_finite: bool


def check_output(checks: DeferredChecks, label: str, out: Tensor, result: Tensor, x: Tensor) -> None:
    """Look through the output of a forward.

    Args:
        checks: Take what a GPU looks through.
        label: The layer's name, for the message.
        out: [T, H], as the backend gave it.
        result: The same on the device of the layer's inputs.
        x: [T, H], the hidden states that were given.

    Raises:
        KTAMXForwardError: The output is not finite, and it is on the CPU; else `checks` raises it.
    """
    if result.is_cuda and (out.is_cuda or out.numel() > _SMALL):
        # The answers alone, not x: a check that is open keeps neither memory nor the layer alive.
        checks.add(functools.partial(_judged_output, label), magnitudes(result, x))
    elif not is_finite(out):
        raise _output_error(label, bool(all_finite(x)))


def arrived_gradient(grad_output: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The gradient of a layer's output, [T, H], as a backend wants it, and whether it is finite.

    Args:
        grad_output: Any floating dtype and device.
        device: The backend's. On a GPU the gradient is taken for finite: nobody waits for the answer.
        dtype: The backend's.
    """
    grad = grad_output.detach().to(dtype).contiguous()
    if device.type != "cpu":
        return to_device(grad, device), True
    if grad.is_cuda and grad.numel() <= _SMALL:
        (grad,) = to_host((grad,), (grad.dtype,)).wait()
    if not grad.is_cuda:
        return grad, is_finite(grad)
    grad, finite = to_host((grad, all_finite(grad)), (grad.dtype, torch.bool)).wait()
    return grad, bool(finite)


def checked(gradients: Gradients, home: torch.device, lora: bool) -> CheckedGradients:
    """Send gradients that the CPU computed to the device of the layer's inputs, and look through them.

    Where that is a GPU it looks through the large ones, and has LoRA's on the way meanwhile: 5 million values are
    copied there, checked, widened and copied back in 1 ms, where a core beside busy operators takes 5 to widen them.

    Args:
        gradients: On the CPU.
        home: The device of the layer's inputs.
        lora: Whether gradients of LoRA are needed; else they are dropped.
    """
    hidden, weights = gradients.hidden_states, gradients.top_k_weights
    gradients = gradients if lora else Gradients(hidden, weights)
    weights_finite = is_finite(weights)
    if home.type != "cuda":
        return CheckedGradients(gradients, is_finite(hidden), weights_finite)
    hidden_finite = is_finite(hidden) if hidden.numel() <= _SMALL else None
    gradients = replace(gradients, hidden_states=to_device(hidden, home), top_k_weights=to_device(weights, home))
    answer = to_host([all_finite(gradients.hidden_states)], [torch.bool]) if hidden_finite is None else None
    if gradients.lora and not gradients.lora_is_free:
        gradients = _lora_on(gradients, home)
    if answer is not None:
        hidden_finite = bool(answer.wait()[0])
    return CheckedGradients(gradients, bool(hidden_finite), weights_finite)


def check_gpu_gradients(
    checks: DeferredChecks, label: str, gradients: Gradients, grad_output: Tensor, lora: LoraTensors | None
) -> None:
    """Have the gradients that a GPU computed looked through: of hidden states and routing weights, and of LoRA there.

    Args:
        checks: Raise KTAMXBackwardError later if they are not finite, though `grad_output` is.
        label: The layer's name, for the message.
        gradients: Of the layer's inputs, on a GPU.
        grad_output: [T, H] on the same GPU, what they were computed from.
        lora: Whose parameters the gradients of LoRA are for; those in host memory are looked through on their way.
    """
    there = lora is not None and lora.parameters[0].device.type != "cpu"
    of_lora = _computed(gradients) if there and gradients.lora else ()
    found = magnitudes(grad_output, gradients.hidden_states, gradients.top_k_weights, *of_lora)
    checks.add(functools.partial(_judged_gradients, label), found)


def lora_gradients(
    checks: DeferredChecks, label: str, gradients: Gradients, lora: LoraTensors, on_gpu: bool
) -> list[Tensor]:
    """Gradients of LoRA parameters, scaled, on the parameters' device, and looked through at once or later.

    Args:
        checks: Take what a GPU looks through.
        label: The layer's name, for the message.
        gradients: What the backend computed, with LoRA's.
        lora: Whose `parameters` the gradients are for.
        on_gpu: Whether the backend's inputs and results are on a GPU.

    Returns:
        In the order of `lora.parameters`, in fp32 or the parameters' dtype. Those that go from a GPU to the CPU may be
        on their way (`LoraTensors.deliver`).

    Raises:
        KTAMXBackwardError: A gradient is not finite, though that of the hidden states is, and it is on the CPU. For one
            on its way there autograd raises it before the parameter gets it, for one on a GPU `checks` does later.
    """
    device = lora.parameters[0].device
    if device.type != "cpu" and gradients.lora[0].device.type == "cpu":
        gradients = _lora_on(gradients, device)
    computed = _computed(gradients)
    error = functools.partial(gradient_error, label, _LORA)
    if _on_gpu(computed[0]):
        scaled = lora.gradients(gradients)
        if device.type != "cpu":
            if not on_gpu:  # else they are looked through already, by `check_gpu_gradients`
                checks.add(lambda found: None if bool((found < math.inf).all()) else error(), magnitudes(*computed))
            return scaled
        passed = all_finite(*computed)
        if on_gpu:  # a gradient that came in without being finite is the gradient scaler's business
            passed = passed | ~all_finite(gradients.hidden_states)
        dtypes = [parameter.dtype for parameter in lora.parameters]  # nothing can be converted on the way
        return lora.deliver(to_host([*scaled, passed], [*dtypes, torch.bool], beside=True), error)
    for tensor in computed:  # before they are widened: half the memory to look through
        if not is_finite(tensor) and bool(all_finite(gradients.hidden_states)):
            raise error()
    return lora.gradients(gradients)


def _computed(gradients: Gradients) -> Sequence[Tensor]:
    """The gradients of LoRA; the memory that they share, if they do."""
    flat = flat_lora(gradients.lora)
    return gradients.lora if flat is None else (flat,)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda  # a function, for tests that have no GPU to put another in its place


def _lora_on(gradients: Gradients, device: torch.device) -> Gradients:
    """With LoRA's gradients copied from the CPU to a GPU."""
    return replace(gradients, lora=lora_to_device(gradients.lora, device), lora_is_free=True)


def _judged_output(label: str, found: Tensor) -> Exception | None:
    """The error of an output and input of these magnitudes; None if the output is finite."""
    result, x = (found < math.inf).tolist()
    return None if result else _output_error(label, x)


def _judged_gradients(label: str, found: Tensor) -> Exception | None:
    """The error of gradients of these magnitudes: the one that came in, those of both inputs, those of LoRA."""
    came, hidden, weights, *lora = (found < math.inf).tolist()
    if not came:  # a gradient scaler's overflow: it skips the step when it sees it
        return None
    if not (hidden and weights):
        return gradient_error(label, "its inputs")
    return None if all(lora) else gradient_error(label, _LORA)


def _output_error(label: str, input_finite: bool) -> KTAMXForwardError:
    where = "its input was finite" if input_finite else "its input already was not"
    return KTAMXForwardError(f"{label}: the output of the experts is not finite (NaN or infinity); {where}.")


def gradient_error(label: str, name: str) -> KTAMXBackwardError:
    """The error of a gradient that is not finite.

    Args:
        label: The layer's name.
        name: What the gradient is of, in words.
    """
    return KTAMXBackwardError(
        f"{label}: the gradient of {name} is not finite (NaN or infinity), though the gradient that came in was."
    )
