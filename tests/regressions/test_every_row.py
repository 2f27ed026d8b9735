"""Every failure that others met has its regression test, named as the failure; and two that need few words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.cases import KERNEL_MARKS, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward
from tests.support.one_layer import inputs
from tests.support.patched import fill_lora, lora_config, patched_model

FAILURES = (
    "meta-device", "gpu-experts-none", "threads-none", "load-order", "safe-open-close", "header-too-large",
    "device-mismatch", "routing-modified", "lora-no-effect", "int8-segfault", "router-shape", "cache-overflow",
    "cache-underflow", "grad-on-gpu", "rank-lost", "trainer-signature", "empty-experts-nan", "fp32-upcast",
    "bf16-range", "cuda-graph", "stale-active-experts", "stale-pointers",
)  # fmt: skip


def test_every_failure_has_its_test() -> None:
    defined = {
        node.name
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert [name for name in FAILURES if f"test_{name.replace('-', '_')}" not in defined] == []


INT8 = """
import sys
import torch
from peft import get_peft_model
from kt_hf import KTAMXError, KTConfig, apply_kt_moe
from tests.support.patched import fill_lora, lora_config, loss_of
from tests.support.models import FAMILIES

family, weights = FAMILIES["qwen2_moe"], sys.argv[2] or None
try:
    model = apply_kt_moe(family(torch.bfloat16), KTConfig(kt_backend=sys.argv[1], kt_weight_path=weights))
    model = get_peft_model(model, lora_config(family))
    fill_lora(model, seed=1)
    loss_of(model, family.inputs()).backward()
    print("trained", all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad))
except KTAMXError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])
@pytest.mark.parametrize("path", ["", "missing", "partial"])
@pytest.mark.parametrize("name", ["AMXInt8", "AMXBF16"])
def test_int8_segfault(mark: None, name: str, path: str, tmp_path: Path) -> None:
    """In a process of its own, as the failure ended one: trains, or says why not; a bad weight path always raises."""
    if path:
        path = str(tmp_path / path)
    if path.endswith("partial"):
        Path(path, "_layer_0", "_numa_0").mkdir(parents=True)
        Path(path, "_layer_0", "_numa_0", "INT8_gate_0_8192Byte_quant_.kt").write_bytes(b"\0" * 100)
    command = [sys.executable, "-W", "ignore", "-c", INT8, name, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    if path or (name == "AMXInt8" and done.stdout != "trained True\n"):
        assert done.stdout.startswith(("KTAMXNotAvailableError ", "KTAMXConfigError ")), done.stdout
        assert "kt_weight_path" in done.stdout or f"kt_backend={name}" in done.stdout
    else:
        assert done.stdout == "trained True\n"


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_grad_on_gpu_by_the_default_device(case: Case, device: str) -> None:
    """`torch.set_default_device` must not reach what the operators get pointers of. "meta" has none, on any machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from peft import get_peft_model

    model = patched_model(MIXTRAL, case)
    with torch.device(device):
        model = get_peft_model(model, lora_config(MIXTRAL, target_modules=["gate_proj", "up_proj", "down_proj"]))
    layer = model._kt_wrappers[0]
    assert {parameter.device.type for parameter in layer.lora_params.values()} == {"cpu"}
    fill_lora(model, seed=1)
    x = inputs(case)
    expected = forward_backward(layer, x)
    fill_lora(model, seed=2)
    fill_lora(model, seed=1)
    with torch.device(device):
        actual = forward_backward(layer, x)
    assert torch.equal(actual.output, expected.output)
    assert [name for name, grad in expected.grads.items() if not torch.equal(actual.grads[name], grad)] == []
