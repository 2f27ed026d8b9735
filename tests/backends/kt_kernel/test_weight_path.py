"""INT8 and a weight path, which crashed: in a process of its own it trains, or says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.cases import KERNEL_MARKS
from tests.support.tiny import ROOT

pytestmark = list(KERNEL_MARKS)

TRAIN = """
import sys
import torch
from peft import get_peft_model
from kt_hf import KTAMXError, KTConfig, apply_kt_moe
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, lora_config, loss_of

family = FAMILIES["deepseek_v2"]
for backend in ("AMXInt8", "AMXBF16"):
    for weights in (None, *sys.argv[1:]):
        try:
            model = apply_kt_moe(family(torch.bfloat16), KTConfig(kt_backend=backend, kt_weight_path=weights))
            model = get_peft_model(model, lora_config(family))
            fill_lora(model, seed=1)
            loss_of(model, family.inputs()).backward()
            print("trained", all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad))
        except KTAMXError as error:
            print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_it_trains_or_a_bad_weight_path_is_refused(tmp_path: Path) -> None:
    missing, partial = tmp_path / "missing", tmp_path / "partial"
    (partial / "_layer_0" / "_numa_0").mkdir(parents=True)
    (partial / "_layer_0" / "_numa_0" / "INT8_gate_0_8192Byte_quant_.kt").write_bytes(b"\0" * 100)
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, missing, partial]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6, lines
    for backend, (trained, *refused) in (("AMXInt8", lines[:3]), ("AMXBF16", lines[3:])):
        assert trained == "trained True"
        for line in refused:
            assert line.startswith(("KTAMXNotAvailableError ", "KTAMXConfigError ")), line
            assert "kt_weight_path" in line or f"kt_backend={backend}" in line
