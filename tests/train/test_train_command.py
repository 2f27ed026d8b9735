"""`kt-hf train configs/demo_smol.yaml` in a new process: trains, evaluates, draws, saves; SFT, DPO and unpatched."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from kt_hf.backends.kt_kernel.installation import availability
from kt_hf.builtin import smollm2_moe as upcycle
from tests.support.tiny import ROOT, kt_hf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(upcycle.GGUF_PACKAGE) is None, reason=f"needs {upcycle.INSTALL_HINT}"
)
SMALL = (
    "model_name_or_path=builtin:smollm2-moe/2", "max_samples=10", "max_steps=2", "eval_steps=1", "save_steps=1",
    "output_dir=out",
    # A CPU without products of bf16 takes six to eight times as long for them.
    *(() if availability("AMXBF16").ok else ("torch_dtype=float32",)),
)  # fmt: skip
Done = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module", params=["sft", "dpo", "unpatched"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    cwd = tmp_path_factory.mktemp(request.param)
    more = {"sft": (), "dpo": ("stage=dpo",), "unpatched": ("use_kt=false",)}[request.param]
    return kt_hf("train", str(ROOT / "configs/demo_smol.yaml"), *SMALL, *more, cwd=cwd), cwd


def test_it_succeeds_and_tells_what_it_does(done: Done) -> None:
    process, cwd = done
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    kind = cwd.name.rstrip("0123456789")
    assert ("2 layers patched, 8 experts each, 2 a token" in process.stdout) == (kind != "unpatched")
    assert ("not patched (use_kt: false)" in process.stdout) == (kind == "unpatched")
    assert "step 2/2  loss " in process.stdout
    assert "step 2/2  evaluation loss " in process.stdout
    assert "What does Python's" in process.stdout  # the example
    assert "<|im_start|>user" in process.stdout  # after templating
    assert "tokens/s" in process.stdout


def test_it_leaves_adapter_checkpoints_plots_and_a_summary(done: Done) -> None:
    folder = done[1] / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "checkpoint-2"):
        assert (folder / name).exists(), name
    patched = "unpatched" not in done[1].name
    for name in ("loss.png", "expert_load.png")[: 1 + patched]:
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = json.loads((folder / "kt_hf_summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["eval_loss"] > 0
    assert summary["tokens"] > 100
    shares = list(summary["expert_load"].values())
    assert [len(share) for share in shares] == [8, 8] * patched
    assert [sum(share) for share in shares] == [pytest.approx(8)] * 2 * patched
    assert not patched or max(shares[0]) > 1.01  # counted, not made up


def test_the_adapter_has_learnt_on_experts_and_attention(done: Done) -> None:
    with safe_open(done[1] / "out" / "adapter_model.safetensors", "pt") as file:
        moved = [key for key in file.keys() if "lora_B" in key and bool(file.get_tensor(key).any())]  # noqa: SIM118
    assert any(".experts." in key for key in moved)
    assert any(".q_proj." in key for key in moved)
    assert any(".layers.1." in key for key in moved)


def test_nothing_else_is_written(done: Done) -> None:
    assert {path.name for path in done[1].iterdir()} <= {"out", "hf"}
