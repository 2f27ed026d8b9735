"""Exports read by others: PEFT, llama.cpp's converter, SGLang's LoRA reader; and a tensor left out is noticed.

The converter and SGLang are no dependencies. KT_TEST_LLAMA_CPP names a source tree of llama.cpp, KT_TEST_SGLANG_PYTHON
and KT_TEST_VLLM_PYTHON a Python in which sglang or vllm can be imported (…_PATH its source, where it is not installed);
without them those tests are skipped.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kt_hf import KTAMXError
from kt_hf.adapters import check_export, convert
from kt_hf.cli import app
from tests.adapters.test_convert import VARIANTS, saved
from tests.support.models import FAMILIES
from tests.support.tiny import environment, save_model, tokenizer
from tests.use.conftest import save_adapter

ADAPTER, FUSED = "adapter_model.safetensors", "fused_expert_lora.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a Mixtral and of its adapter."""
    base = tmp_path_factory.mktemp("base")
    FAMILIES["mixtral"](torch.float32).save_pretrained(base)
    tokenizer().save_pretrained(base)
    return base, save_adapter(base, tmp_path_factory.mktemp("adapter"))


def without_last(file: Path, match: str) -> str:
    """Leave a tensor out of a safetensors file, as a broken copy would."""
    tensors = load_file(file)
    name = sorted(name for name in tensors if match in name)[-1]
    del tensors[name]
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("to", ["peft", "per-expert", "fused", "merged"])
def test_a_tensor_left_out_is_noticed(to: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    output = convert(adapter, tmp_path / to, to=to, base=base)
    check_export(output, adapter, base)
    file = {"fused": FUSED, "merged": "model.safetensors"}.get(to, ADAPTER)
    name = without_last(output / file, "experts")
    with pytest.raises(KTAMXError, match="lacks 1 of") as raised:
        check_export(output, adapter, base)
    assert name in str(raised.value)


def test_a_layer_left_out_of_sglangs_file_is_noticed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    output = convert(adapter, tmp_path / "experts.pt")
    check_export(output, adapter, base)
    content = torch.load(output, weights_only=True)
    del content["layer_1"]["up_lora_b"]
    torch.save(content, output)
    with pytest.raises(KTAMXError, match=r"lacks 1 of 12 tensors, layer_1\.up_lora_b"):
        check_export(output, adapter, base)


def change_one(file: Path, match: str, by: float = 0.01) -> str:
    """Change the last number of the last tensor of a file whose name holds `match`."""
    tensors = load_file(file)
    name = sorted(name for name in tensors if match in name)[-1]
    tensors[name].view(-1)[-1] += by
    save_file(tensors, file)
    return name


CHANGES = {
    "kt": ("experts.gate_proj.lora_A", "experts.down_proj.lora_B", "q_proj.lora_B"),
    "peft": ("base_layer.lora_A", "base_layer.lora_B", "experts.lora_A", "experts.lora_B", "q_proj.lora_A"),
    "per-expert": ("0.w1.lora_A", "7.w2.lora_B", "w3.lora_B", "o_proj.lora_B"),
    "fused": ("gate_lora_a", "up_lora_b", "down_lora_b"),
    "merged": ("experts.0.w1", "experts.7.w2", "w3", "q_proj", "norm.weight", "embed_tokens", "gate.weight"),
}


@pytest.mark.parametrize(("to", "match"), [(to, match) for to, matches in CHANGES.items() for match in matches])
def test_one_number_changed_is_noticed(to: str, match: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    output = convert(adapter, tmp_path / to, to=to, base=base)
    check_export(output, adapter, base)
    (output / "kt_adapter_manifest.json").unlink(missing_ok=True)
    name = change_one(output / {"fused": FUSED, "merged": "model.safetensors"}.get(to, ADAPTER), match)
    with pytest.raises(KTAMXError, match="is of other values than") as raised:
        check_export(output, adapter, base)
    assert name in str(raised.value)


@pytest.mark.parametrize("to", ["kt", "peft", "per-expert", "fused"])
@pytest.mark.parametrize("change", [{"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"o_proj": 3}}])
def test_another_factor_is_noticed(
    change: dict[str, object], to: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """As far as the export's reader knows the setting: of per-expert and fused it is lora_alpha alone."""
    base, adapter = trained
    output = convert(adapter, tmp_path / to, to=to, base=base)
    config = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(config | change))
    if to in ("per-expert", "fused") and "lora_alpha" not in change:
        check_export(output, adapter, base)
        return
    with pytest.raises(KTAMXError, match="is of other values than"):
        check_export(output, adapter, base)


def test_a_number_of_sglangs_file_and_its_zeros(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = trained
    adapter = save_adapter(base, tmp_path / "down", target_modules=["down_proj"])
    output = convert(adapter, tmp_path / "experts.pt")
    check_export(output, adapter, base)
    for name in ("down_lora_a", "gate_lora_b"):  # the second was not trained
        content = torch.load(output, weights_only=True)
        content["layer_1"][name][7, -1, -1] += 0.01
        torch.save(content, tmp_path / "changed.pt")
        with pytest.raises(KTAMXError, match=f"layer_1.{name}.* is of other values than"):
            check_export(tmp_path / "changed.pt", adapter, base)


def test_a_merge_into_bf16_is_right_to_its_rounding(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    output = convert(adapter, tmp_path / "merged", to="merged", base=base)
    check_export(output, adapter, base)
    tensors = load_file(output / "model.safetensors")
    for match in ("experts.1.w3.weight", "o_proj.weight"):
        name = next(name for name in tensors if match in name)
        values = tensors[name].view(-1)
        place = int(values.float().abs().argmax())
        values[place] *= 1.02  # a few steps of bf16
        save_file(tensors, output / "model.safetensors", {"format": "pt"})
        with pytest.raises(KTAMXError, match=f"{name} is of other values than"):
            check_export(output, adapter, base)
        values[place] /= 1.02


def test_experts_that_changed_places_are_noticed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    output = convert(adapter, tmp_path / "out", to="per-expert", base=base)
    tensors = load_file(output / ADAPTER)
    one, other = (f"base_model.model.model.layers.0.block_sparse_moe.experts.{e}.w1.lora_B.weight" for e in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, output / ADAPTER)
    with pytest.raises(KTAMXError, match="other values"):
        check_export(output, adapter, base)


def test_the_verb_checks(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    words = ["export", str(adapter), str(tmp_path / "out"), "--to", "peft", "--base", str(base), "--check"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's are not for who exports
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Checked: every tensor is there, of the values that adapter and base give." in result.stdout
    assert "SGLang and llama.cpp do not read it" in result.stdout


def test_transformers_and_peft_take_every_tensor(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    output = convert(adapter, tmp_path / "peft", to="peft", base=base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    saved = load_file(output / ADAPTER)
    state = {name.replace(".default.", "."): value for name, value in model.named_parameters() if "lora_" in name}
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@dataclass
class Exported:
    """A base model's folder, and an adapter as servers read it: of one rank and one factor."""

    base: Path
    folder: Path

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By name; their values are compared with the adapter's in test_uniform.py."""
        return load_file(self.folder / ADAPTER)

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration."""
        config: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return config

    def expert(self, layer: int, expert: int, name: str, side: str) -> Tensor:
        """A or B of one projection of one expert."""
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
        return self.tensors[f"{stem}.{WEIGHTS[name]}.lora_{side}.weight"]


WEIGHTS = {"gate": "w1", "down": "w2", "up": "w3"}


@pytest.fixture(scope="module", params=["plain", "rslora and patterns"])
def exported(request: pytest.FixtureRequest, trained: tuple[Path, Path], tmp_path_factory: Any) -> Exported:
    """Of an adapter with one rank, and of one with several ranks and factors, made one."""
    base, adapter = trained
    if request.param != "plain":
        adapter, _ = saved(
            FAMILIES["mixtral"], tmp_path_factory.mktemp("many"), **VARIANTS["patterns"], use_rslora=True
        )
    return Exported(base, convert(adapter, tmp_path_factory.mktemp("out") / "out", to="per-expert", base=base))


@pytest.mark.skipif(not os.environ.get("KT_TEST_LLAMA_CPP"), reason="KT_TEST_LLAMA_CPP names no tree of llama.cpp")
def test_llama_cpps_converter_takes_every_tensor(exported: Exported, tmp_path: Path) -> None:
    import gguf

    script, written = Path(os.environ["KT_TEST_LLAMA_CPP"], "convert_lora_to_gguf.py"), tmp_path / "adapter.gguf"
    words = [
        sys.executable,
        str(script),
        str(exported.folder),
        "--base",
        str(exported.base),
        "--outfile",
        str(written),
        "--outtype",
        "f32",
    ]
    ran = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    reader = gguf.GGUFReader(written)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
    for layer in range(2):
        for name, theirs in names.items():
            for side in "ab":
                mine = torch.stack([exported.expert(layer, e, name, side.upper()) for e in range(8)])
                assert torch.equal(stored.pop(f"blk.{layer}.{theirs}.weight.lora_{side}").view_as(mine), mine)
    assert len(stored) == 2 * 4 * 2  # attention's
    assert reader.fields["adapter.lora.alpha"].contents() == pytest.approx(exported.config["lora_alpha"])


SGLANG = """
import json, sys, torch
from safetensors.torch import load_file
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from transformers import AutoConfig
output, base = sys.argv[1:]
adapter = LoRAAdapter("a", LoRAConfig(path=output), AutoConfig.from_pretrained(base), None, None)
adapter.initialize_weights_from_tensors(load_file(output + "/adapter_model.safetensors"))
torch.save([dict(layer.weights) for layer in adapter.layers], output + "/read.pt")
print(json.dumps({"scaling": adapter.scaling}))
"""


@pytest.mark.skipif(not os.environ.get("KT_TEST_SGLANG_PYTHON"), reason="KT_TEST_SGLANG_PYTHON names no Python")
def test_sglangs_reader_takes_every_tensor(exported: Exported) -> None:
    words = [os.environ["KT_TEST_SGLANG_PYTHON"], "-c", SGLANG, str(exported.folder), str(exported.base)]
    paths = {"PYTHONPATH": os.environ.get("KT_TEST_SGLANG_PATH", "")}
    ran = subprocess.run(words, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    config, layers = exported.config, torch.load(exported.folder / "read.pt", weights_only=True)
    assert json.loads(ran.stdout.splitlines()[-1])["scaling"] == pytest.approx(config["lora_alpha"] / config["r"])
    taken = sum(t.numel() for weights in layers for t in weights.values())
    assert taken == sum(t.numel() for t in exported.tensors.values())
    for expert, side in itertools.product(range(8), "AB"):
        gate, up, down = (exported.expert(1, expert, name, side) for name in ("gate", "up", "down"))
        stem = f"base_model.model.model.layers.1.block_sparse_moe.experts.{expert}"
        read = {n: layers[1][f"{stem}.{n}.lora_{side}.weight"] for n in ("gate_up_proj", "down_proj")}
        assert torch.equal(read["gate_up_proj"], torch.cat([gate, up]))
        assert torch.equal(read["down_proj"], down)


VLLM = """
import sys, torch
from vllm.lora import lora_model
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
output = sys.argv[1]
lora_model.PIN_MEMORY = False  # which needs a driver
names = {f"experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")} | {"q_proj", "k_proj", "v_proj", "o_proj"}
helper = PEFTHelper.from_local_dir(output, None)
model = LoRAModel.from_local_checkpoint(output, names, helper, lora_model_id=1, device="cpu")
stem = "model.layers.1.block_sparse_moe.experts"
each = [model.get_lora(f"{stem}.{e}.{w}") for e in range(8) for w in ("w1", "w2", "w3")]
count = sum(one.lora_a.numel() + one.lora_b.numel() for one in model.loras.values())
packed = PackedLoRALayerWeights.pack_moe(each, stem)
scalings = [one.scaling for one in each]
torch.save({"a": packed.lora_a, "b": packed.lora_b, "count": count, "scalings": scalings}, output + "/read.pt")
"""


@pytest.mark.skipif(not os.environ.get("KT_TEST_VLLM_PYTHON"), reason="KT_TEST_VLLM_PYTHON names no Python")
def test_vllms_reader_takes_every_tensor(exported: Exported) -> None:
    words = [os.environ["KT_TEST_VLLM_PYTHON"], "-c", VLLM, str(exported.folder)]
    paths = {"PYTHONPATH": os.environ.get("KT_TEST_VLLM_PATH", "")}
    ran = subprocess.run(words, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    config, read = exported.config, torch.load(exported.folder / "read.pt", weights_only=True)
    assert read["count"] == sum(t.numel() for t in exported.tensors.values())
    for index, name in enumerate(WEIGHTS):
        a, b = (torch.stack([exported.expert(1, e, name, side) for e in range(8)]) for side in "AB")
        assert torch.equal(read["a"][index], a)
        # The factor is in B, or is multiplied when it is computed.
        factors = read["b"][index] / b * torch.tensor(read["scalings"]).view(8, 3)[:, index].view(8, 1, 1)
        assert torch.allclose(factors[b != 0], torch.tensor(config["lora_alpha"] / config["r"]))
