"""A tiny layer of experts, forward and backward, by one backend, compared with plain PyTorch in fp32.

Run as a program, this module prints JSON, so that `kt-hf doctor` can run it in a new process: instructions that a CPU
lacks end the process that uses them.

python -m kt_hf.tools.selftest AMXBF16
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KTAMXError
from ..system.child import answer_of

E, K, H, I, T, R = 4, 2, 128, 128, 33, 8  # noqa: E741
# Largest relative errors. (The backends' tests allow bf16 an error of 2 % in every gradient, on layers of real size.)
TOLERANCE = {
    "AMXBF16": 0.03, "AMXInt8": 0.05, "AMXInt4": 0.4, "MXFP4": 0.4, "AMXFP8": 0.15, "AMXInt4KGroup": 0.4, "torch": 1e-4,
}  # fmt: skip


@dataclass
class SelfTest:
    """The result of a self-test.

    Attributes:
        backend: The backend that was tested.
        output_error: Relative error of the output; None if the test did not run to the end.
        gradient_error: The largest relative error of a gradient; None likewise.
        problem: Why the test failed, in words; None if it passed.
    """

    backend: str
    output_error: float | None = None
    gradient_error: float | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the test passed."""
        return self.problem is None


def in_new_process(backend: str, seconds: float = 120) -> SelfTest:
    """Run the test of a backend in a new process; a crash or a hang of it is reported as the result's `problem`."""
    try:
        return SelfTest(**answer_of("kt_hf.tools.selftest", backend, seconds))
    except (KTAMXError, TypeError) as error:
        return SelfTest(backend, problem=str(error))


def run(backend: str) -> SelfTest:
    """Compute the layer with `backend` in this process, and compare."""
    from ..backends import ExpertWeights, build_backend
    from ..shapes import ExpertShape
    from ..system.cpu import plan_threads

    draw = torch.Generator().manual_seed(0)

    def values(*size: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*size, generator=draw) * scale).bfloat16().float()

    shape = ExpertShape(E, K, H, I)
    gate_up, down, x, grad = values(E, 2 * I, H), values(E, H, I), values(T, H, scale=1), values(T, H, scale=1)
    lora = tuple(values(*size) for size in shape.lora_shapes(R))
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(T)])
    routing = torch.rand(T, K, generator=draw)
    expected = _reference(gate_up, down, lora, x, ids, routing, grad)
    dtype = torch.float32 if backend == "torch" else torch.bfloat16
    weights = ExpertWeights(gate_up.to(dtype), down.to(dtype))
    layer = build_backend(backend, weights, shape, R, plan_threads(1), T, False, False, "self-test")
    layer.set_lora(lora)
    output, saved = layer.forward(x.to(dtype), ids, routing, save=True)
    assert saved is not None
    gradients = layer.backward(saved, grad.to(dtype))
    output_error = _error(output, expected[0])
    actual = (gradients.hidden_states, gradients.top_k_weights, *gradients.lora)
    gradient_error = max(_error(a, b) for a, b in zip(actual, expected[1:], strict=True))
    worst = max(output_error, gradient_error)
    problem = None
    if not worst <= TOLERANCE[backend]:  # also when it is not a number
        problem = f"wrong numbers: relative error {worst:.2g}, at most {TOLERANCE[backend]:g} expected"
    return SelfTest(backend, output_error, gradient_error, problem)


def _reference(
    gate_up: Tensor, down: Tensor, lora: tuple[Tensor, ...], x: Tensor, ids: Tensor, routing: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Output and the gradients of x, of the routing weights and of LoRA, by autograd."""
    leaves = [t.clone().requires_grad_() for t in (x, routing, *lora)]
    hidden, weights, gate_a, gate_b, up_a, up_b, down_a, down_b = leaves
    rows = []
    for token in range(T):
        total = torch.zeros(H)
        for slot, e in enumerate(ids[token].tolist()):
            v = hidden[token]
            g = gate_up[e, :I] @ v + gate_b[e] @ (gate_a[e] @ v)
            u = gate_up[e, I:] @ v + up_b[e] @ (up_a[e] @ v)
            h = torch.nn.functional.silu(g) * u
            total = total + weights[token, slot] * (down[e] @ h + down_b[e] @ (down_a[e] @ h))
        rows.append(total)
    output = torch.stack(rows)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1]).__dict__))
