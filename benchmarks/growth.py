"""Cost against tokens, experts, LoRA rank and layers, one varied at a time: a least-squares line for each.

    python benchmarks/growth.py [--cases default torch] [--runs 7]

Prints for forward and backward milliseconds a unit, what is left at zero (what a call costs whatever its size), and the
largest distance of a point from the line. Layers are called one after the other, forward and then backward, as a model
does; an expert costs memory traffic even when the tokens stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import adapted, torch_threads
from harness import append, cores, describe, parser, timed
from lines import fit
from processes import Run, take_turns
from shapes import make_batch, random_model
from sizes import Shape
from torch import Tensor

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import kernel_availability
from kt_hf.system.cpu import plan_threads

BASE = {"T": 256, "E": 16, "r": 8, "L": 2}
VARIED = {"T": (64, 128, 256, 512, 1024), "E": (8, 16, 32, 64), "r": (4, 8, 16, 32, 64), "L": (1, 2, 4, 8)}
SMALL = {"T": (16, 32, 64), "E": (4, 8), "r": (4, 8), "L": (1, 2)}  # to try the script
K, H, INNER = 2, 512, 512


def label(point: dict[str, int]) -> str:
    return f"E={point['E']} K={K} H={H} I={INNER} r={point['r']} L={point['L']}"


def point_run(backend: str, point: dict[str, int]) -> Run:
    """Forward and backward of a point's layers. The number of tokens comes with the call."""
    shape = Shape("", point["E"], K, H, INNER)
    config = KTConfig(kt_backend=backend, kt_lora_rank=point["r"], kt_share_backward_weights=False)
    model = adapted(apply_kt_moe(random_model(shape, point["L"]), config), point["r"])
    layers: list[Any] = list(model._kt_wrappers)
    for layer in layers:
        layer.update_lora_pointers()
    parameters = [p for p in model.parameters() if p.requires_grad]
    threads = torch_threads(layers[0].backend)

    def run(tokens: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        batch = make_batch(shape, tokens)
        for parameter in parameters:
            parameter.grad = None
        weights = batch["weights"].clone().requires_grad_()
        inputs = [batch["x"].clone().requires_grad_() for _ in layers]
        outputs: list[Tensor] = []

        def forward() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                outputs.append(layer(x, batch["ids"], weights))

        def backward() -> None:
            for out in reversed(outputs):
                out.backward(batch["grad"])

        return {"forward": timed(forward), "backward": timed(backward)}

    run.model = model  # type: ignore[attr-defined]  # the layers must live as long
    return run


def build(case: str, points: list[dict[str, int]]) -> Callable[[], dict[str, Run]]:
    def make() -> dict[str, Run]:
        backend = "auto" if case == "default" else case
        distinct = {label(point): point for point in points}
        return {f"{case}/{name}": point_run(backend, point) for name, point in distinct.items()}

    return make


def main() -> None:
    arguments = parser(__doc__, runs=7)
    arguments.add_argument("--cases", nargs="+", choices=("default", "torch"), default=["default"])
    arguments.add_argument("--small", action="store_true", help="few and small points, to try the script")
    given = arguments.parse_args()
    print(describe())
    varied = SMALL if given.small else VARIED
    for case in given.cases:
        operators = case == "default" and kernel_availability().ok
        threads = plan_threads().workers if operators else cores()
        others = [BASE | {name: value} for name, values in varied.items() if name != "T" for value in values]
        by_tokens = take_turns({case: build(case, [BASE])}, varied["T"], given.runs, keep=True)
        by_size = take_turns({case: build(case, others)}, [BASE["T"]], given.runs, keep=True)
        for name, values in varied.items():
            made = by_tokens if name == "T" else by_size
            points = [BASE | {name: value} for value in values]
            found = [(p[name], made[f"{case}/{label(p)}", p["T"]]) for p in points]
            for value, timing in found:
                point = BASE | {name: value}
                append("growth", label(point), point["T"], threads, {f"{case}, {name} varied": timing}, given.save)
            for part in ("forward", "backward"):
                line = fit([value for value, _ in found], [timing.median(part) * 1e3 for _, timing in found])
                print(f"{case:8s} {part:8s} {name}: {line.fixed:8.3f} ms + {line.slope * 1e3:9.3f} us x {name}   "
                      f"(off by at most {line.worst:.0%})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
