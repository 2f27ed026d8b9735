"""A checkpoint that lacks a weight of the model, or has it in another shape, is refused by file and name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kt_hf.checkpoint.complete import check_complete
from kt_hf.errors import KTAMXError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
FAMILIES = {"Mixtral": {}, "Qwen3Moe": {"tie_word_embeddings": True}, "DeepseekV3": {}, "Qwen2Moe": {}}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = getattr(transformers, f"{request.param}Config")
    known = set(kind().to_dict()) | {"num_local_experts", "head_dim"}
    config = kind(**{key: value for key, value in SIZES.items() if key in known}, **FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def check(folder: Path) -> list[str]:
    return check_complete(folder, transformers.AutoConfig.from_pretrained(folder))


def test_a_whole_one_is_accepted_and_what_it_has_too_much_is_told(saved: Path, tmp_path: Path) -> None:
    assert check(saved) == []
    more = {"model.layers.7.self_attn.q_proj.weight": torch.zeros(32, 32)}
    assert check(changed(saved, tmp_path, lambda tensors: tensors.update(more))) == list(more)


def test_every_weight_that_is_missing_is_refused(saved: Path, tmp_path: Path) -> None:
    """One tensor of each kind taken out in turn, of the last layer that has it."""
    kinds = {re.sub(r"\.\d+\.", ".N.", name): name for name in load_file(saved / "model.safetensors")}
    names = list(kinds.values())
    assert len(names) > 12
    for name in names:
        folder = changed(saved, tmp_path, lambda tensors: tensors.pop(name))  # noqa: B023
        with pytest.raises(KTAMXError, match=r"model\.safetensors") as caught:
            check(folder)
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        assert last in str(caught.value), (name, str(caught.value))


@pytest.mark.parametrize("part", ["norm.weight", "q_a_proj.weight", "q_proj.weight", "gate.weight", "down_proj.weight"])
def test_a_weight_of_another_shape_is_refused(part: str, saved: Path, tmp_path: Path) -> None:
    names = [name for name in load_file(saved / "model.safetensors") if name.endswith(part)]
    if not names:
        pytest.skip(f"this family has no {part}")
    folder = changed(saved, tmp_path, lambda tensors: tensors.update({names[-1]: torch.zeros(5, 3)}))
    with pytest.raises(KTAMXError, match=r"model\.safetensors: .*\[5, 3\]"):
        check(folder)


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    content = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(KTAMXError, match="truncated"):
        check(tmp_path)


def test_checkpoints_quantized_in_another_way_are_left_to_transformers(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert check(folder) == []
