"""Program of test_pools: layers on two pools of one NUMA node, in a process whose pools nobody has made yet."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from kt_hf import KTAMXConfigError, apply_kt_moe
from kt_hf.placement import assembly
from kt_hf.quantized import open_saved
from kt_hf.system.cpu import ThreadPlan
from kt_hf.tools import quantize as command
from tests.support.cases import Case
from tests.support.layers import SCALING, forward_backward, make_inputs, random_lora, set_lora
from tests.support.low_bit import wide
from tests.support.models import base_weights
from tests.support.patched import adapted_model
from tests.support.quantized_folders import load, quantised, results, save_checkpoint, settings
from tests.support.reference import experts_forward_backward, relative_error

for module in (assembly, command):
    module.plan_threads = lambda *_, **__: ThreadPlan(((0, 1), (0, 1)))


def errors(backend: str, share: bool) -> list[dict[str, float]]:
    """Of output and gradients with three values of LoRA in turn, the second and third after a refresh."""
    family = wide(inner=256)
    case = Case(backend, torch.bfloat16, 0, 0, 0)
    base = base_weights(family(case.dtype))[0]
    layer = adapted_model(family, case, kt_share_backward_weights=share)._kt_wrappers[0]
    assert layer.factory.threads.pools == ((0, 1), (0, 1))
    found = []
    for seed in range(3):
        lora, x = random_lora(family, seed), make_inputs(family, 37 + seed, case.dtype, seed)
        set_lora(layer, lora)
        actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
        found.append({"output": relative_error(actual.output, expected.output)})
        found[-1] |= {name: relative_error(actual.grads[name], grad) for name, grad in expected.grads.items()}
    return found


def saved_is_online() -> list[str]:
    """Names of what differs between weights quantised online and saved ones, in two pools."""
    family = wide(inner=256)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = save_checkpoint(Path(place) / "model", family)
        folder = quantised(checkpoint, Path(place) / "saved")
        assert open_saved(folder).manifest.pools == 2
        assert (folder / "layer_0000" / "_numa_1").is_dir()
        share = {"kt_share_backward_weights": False}
        expected = results(load(checkpoint, family), family, settings(**share))
        found = results(load(checkpoint, family), family, settings(path=folder, **share))
        one = quantised(checkpoint, Path(place) / "one", pools=2)
        assert open_saved(one).manifest.pools == 2
        return [name for name, value in expected.items() if relative_error(found[name], value) > 1e-2]


def refusal() -> str:
    try:
        apply_kt_moe(wide()(torch.bfloat16), settings("int4"))
    except KTAMXConfigError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [("AMXBF16", False), ("AMXBF16", True), ("AMXInt8", False), ("AMXInt8", True), ("AMXInt4", False)]
    made = {
        "errors": {f"{backend} {share}": errors(backend, share) for backend, share in cases},
        "differ": saved_is_online(),
        "refusal": refusal(),
    }
    print("RESULT " + json.dumps(made))
    sys.exit(0)
