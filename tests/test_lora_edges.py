"""`kt_lora_config` and the other doors of the Python API: tasks, towers, and what is refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from kt_hf import KTAMXConfigError, KTConfig, KTMoECallback, apply_kt_moe, count_experts, kt_lora_config, load_kt_model
from kt_hf.config import as_config
from kt_hf.lora import linear_targets
from tests.support.models import FAMILIES

QWEN3 = FAMILIES["qwen3_moe"]
TORCH = KTConfig(kt_backend="torch")
EVERYTHING = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def patched() -> PreTrainedModel:
    return apply_kt_moe(QWEN3(), TORCH)


# Tasks

TASKS = {
    "Qwen3MoeForSequenceClassification": (TaskType.SEQ_CLS, "score"),
    "Qwen3MoeForTokenClassification": (TaskType.TOKEN_CLS, "score"),
    "Qwen3MoeForQuestionAnswering": (TaskType.QUESTION_ANS, "qa_outputs"),
    "Qwen3MoeForCausalLM": (TaskType.CAUSAL_LM, None),
    "Qwen3MoeModel": (TaskType.FEATURE_EXTRACTION, None),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_task_follows_the_class_and_its_head_is_trained(name: str, tmp_path: Path) -> None:
    task, head = TASKS[name]
    config = QWEN3().config
    config.num_labels, config.pad_token_id = 3, 0
    model = apply_kt_moe(getattr(transformers, name)(config), TORCH)
    made = kt_lora_config(model, lora_rank=2)
    assert made.task_type == task
    assert made.target_modules == EVERYTHING
    model = get_peft_model(model, made)
    in_full = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".")[2] for n in in_full} == ({head} if head else set())
    ids = torch.tensor([[1, 2, 3, 4]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    next(value for value in out.values() if isinstance(value, torch.Tensor)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in in_full)


def test_a_given_task_is_kept() -> None:
    assert kt_lora_config(patched(), task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


# Towers


def small(config: Any) -> Any:
    """A configuration of a model that sees, with two decoder layers, the second of experts."""
    text = config.get_text_config()
    text.num_hidden_layers, text.mlp_layer_types = 2, ["dense", "sparse"]
    for part in vars(config).values():
        for name in ("depth", "num_hidden_layers", "encoder_layers"):
            if part is not text and hasattr(part, "to_dict") and hasattr(part, name):
                setattr(part, name, 2)
    return config


SEEING = {
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Ernie4_5_VLMoeForConditionalGeneration": "ernie4_5_vl_moe",
    "UnlimitedOcrForConditionalGeneration": "unlimited_ocr",
    "DeepseekOcr2ForConditionalGeneration": "deepseek_ocr2",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "qwen3_omni_moe",
}


@pytest.mark.parametrize("name", SEEING)
def test_targets_are_of_the_language_model(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = transformers.AutoConfig.for_model(SEEING[name])
    config = small(getattr(config, "thinker_config", config))
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config)
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    towers = {n for n in linear if any(word in n for word in ("vision", "visual", "audio"))}
    targets = set(linear_targets(model))
    assert towers
    assert targets
    assert not targets & towers
    assert {n for n in linear if ".language_model." in n and not n.endswith((".gate", ".router"))} <= targets
    # PEFT reaches these alone: no convolution, no tower, whatever short names would match.
    model = get_peft_model(model, kt_lora_config(model), low_cpu_mem_usage=True)
    reached = {n.removeprefix("base_model.model.").removesuffix(".lora_A") for n, _ in model.named_modules()
               if n.endswith(".lora_A")}  # fmt: skip
    assert reached == targets


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 2)
        self.q_proj, self.qkv = nn.Linear(4, 4), nn.Linear(4, 4)


def test_names_of_a_tower_alone_reach_the_tower() -> None:
    model = patched()
    model.vision_tower = Tower()
    targets = kt_lora_config(model).target_modules
    assert "q_proj" not in targets
    assert "model.layers.0.self_attn.q_proj" in targets
    assert "k_proj" in targets
    assert not any("vision" in name for name in targets)
    assert kt_lora_config(model, lora_target="qkv").target_modules == {"qkv"}
    assert kt_lora_config(model, lora_target="vision_tower.q_proj").target_modules == {"vision_tower.q_proj"}
    assert all(n.startswith("model.layers.") for n in kt_lora_config(model, lora_target=["q_proj"]).target_modules)
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2))
    assert not [n for n, _ in model.named_parameters() if "vision" in n and "lora" in n]
    again = kt_lora_config(model, lora_rank=2)  # of the PeftModel: the same layers, not what is inside of them
    assert again.target_modules == targets


# What is refused in words

WRONG = [
    ({"lora_rank": 0}, "lora_rank=0"),
    ({"lora_rank": -1}, "lora_rank=-1"),
    ({"lora_rank": True}, "lora_rank=True"),
    ({"lora_rank": 8.0}, "lora_rank=8.0"),
    ({"lora_rank": "8"}, "lora_rank='8'"),
    ({"lora_rank": 10**9}, "lora_rank=1000000000"),
    ({"lora_rank": None}, "lora_rank=None"),
    ({"lora_alpha": math.nan}, "lora_alpha=nan"),
    ({"lora_alpha": math.inf}, "lora_alpha=inf"),
    ({"lora_alpha": 0}, "lora_alpha=0"),
    ({"lora_alpha": -16}, "lora_alpha=-16"),
    ({"lora_alpha": "16"}, "lora_alpha='16'"),
    ({"lora_alpha": None}, "lora_alpha=None"),
    ({"lora_dropout": math.nan}, "lora_dropout=nan"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"lora_dropout": 1}, "lora_dropout=1"),
    ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
    ({"lora_target": []}, "lora_target is empty"),
    ({"lora_target": ""}, "lora_target is empty"),
    ({"lora_target": " , "}, "lora_target is empty"),
    ({"lora_target": [1]}, "lora_target: 1 is no name"),
    ({"lora_target": None}, "lora_target=None"),
    ({"lora_target": 3}, "lora_target=3"),
    ({"lora_target": b"q_proj"}, "lora_target=b'q_proj'"),
    ({"lora_target": "all,q_proj"}, "all stands alone"),
    ({"lora_target": "q_prj"}, "Did you mean q_proj?"),
    ({"r": 8}, "r is called lora_rank"),
    ({"target_modules": ["q_proj"]}, "target_modules is called lora_target"),
    ({"use_rslorra": True}, "Did you mean use_rslora?"),
    ({"rank": 4}, "rank is no argument"),
    ({"task_type": "NONSENSE"}, "LoraConfig refuses"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return patched()


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
def test_kt_lora_config_refuses(model: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KTAMXConfigError) as error:
        kt_lora_config(model, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wrong", ["Qwen/Qwen3-30B-A3B", None, {}, Path("folder"), QWEN3], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(KTAMXConfigError, match="is no model"):
        kt_lora_config(wrong)
    with pytest.raises(KTAMXConfigError, match=r"is no model.*load_kt_model"):
        apply_kt_moe(wrong)


def test_a_model_is_no_name(model: PreTrainedModel) -> None:
    with pytest.raises(KTAMXConfigError, match=r"Qwen3MoeForCausalLM.*apply_kt_moe takes a model"):
        load_kt_model(model)


def test_a_dict_is_a_config() -> None:
    model = apply_kt_moe(QWEN3(), {"kt_backend": "torch", "kt_lora_rank": 4})
    assert model._kt_config == KTConfig(kt_backend="torch", kt_lora_rank=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kt_bakend": "torch"}, "Did you mean kt_backend?"),
        ({"kt_lora_rank": -1}, "kt_lora_rank=-1"),
        ({1: 2}, "1 is no setting"),
        ("torch", "cfg='torch' are no settings"),
        (["torch"], "are no settings"),
        (LoraConfig(), "are no settings"),
        (0, "cfg=0 are no settings"),
    ],
    ids=str,
)
def test_what_is_no_config_is_refused(config: Any, message: str) -> None:
    with pytest.raises(KTAMXConfigError) as error:
        apply_kt_moe(QWEN3(), config)
    assert message in str(error.value)
    assert as_config(None) == KTConfig()


def test_from_dict_takes_mappings_alone() -> None:
    with pytest.raises(KTAMXConfigError, match="takes a mapping"):
        KTConfig.from_dict("kt_backend")


@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_an_adapter_without_targets_is_refused(config: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=r"target_modules=None.*kt_lora_config\(model\)"):
        get_peft_model(patched(), config())


def test_an_adapter_without_targets_gets_those_that_peft_has() -> None:
    """PEFT's table names them for Mixtral."""
    model = get_peft_model(apply_kt_moe(FAMILIES["mixtral"](), TORCH), LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("batches", [torch.ones(1, 4, dtype=torch.long), {"input_ids": [[1]]}, "text"], ids=str)
def test_one_batch_is_no_list_of_batches(model: PreTrainedModel, batches: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=r"give a list of batches, \[batch\] for one"):
        count_experts(model, batches)
    with pytest.raises(KTAMXConfigError, match="is no model"):
        count_experts("name", [batches])


def test_the_callbacks_adapter_is_a_path() -> None:
    with pytest.raises(KTAMXConfigError, match="adapter=3 is no path"):
        KTMoECallback(adapter=3)


def test_experts_of_ligers_class_are_taken_for_what_they_are() -> None:
    """`apply_kt_moe` after Liger replaced the class of the experts, before the model was loaded: SiLU, unnamed."""
    model = QWEN3()
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).logits
    kind = type("LigerExperts", (nn.Module,), {"__module__": "liger_kernel.transformers.swiglu"})
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            old, layer.mlp.experts = layer.mlp.experts, kind()
            layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj = old.gate_up_proj, old.down_proj
    assert torch.allclose(apply_kt_moe(model, TORCH)(ids).logits, expected, atol=1e-5)


# Doors of files and of PEFT's settings

NO_PATHS = [None, 5, b"a", ["a"], {}, "", "a\0b", 1.5]


@pytest.mark.parametrize("given", NO_PATHS, ids=repr)
def test_what_is_no_path_is_told_by_every_door(given: Any, tmp_path: Path) -> None:
    from kt_hf import read_placement, verify_adapter
    from kt_hf.adapters import check_checkpoint, convert, last_complete, load_adapter, open_adapter
    from kt_hf.quantized import open_saved

    model = patched()
    doors: list[Any] = [
        lambda: verify_adapter(given), lambda: check_checkpoint(given), lambda: last_complete(given),
        lambda: read_placement(given), lambda: open_saved(given), lambda: load_adapter(model, given),
        lambda: open_adapter(given).__enter__(), lambda: convert(given, tmp_path / "out", to="peft"),
        lambda: convert(tmp_path, given, to="peft"),
    ]  # fmt: skip
    if given is not None and not isinstance(given, dict):
        doors += [lambda: apply_kt_moe(QWEN3(), TORCH, placement=given)]
    for door in doors:
        with pytest.raises(KTAMXConfigError, match="is no path: give one"):
            door()


@pytest.mark.parametrize("counts", [{"a": torch.ones(4)}, {0: "x"}, {0: torch.ones(2, 2)}, {None: [1]}, {-1: [1]}])
def test_counts_that_are_none_are_told(counts: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=r"placement: .* is no layer's number with a count"):
        apply_kt_moe(QWEN3(), TORCH, placement=counts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", True), ("r", 2**40), ("r", "8"), ("lora_alpha", "16"), ("lora_alpha", None), ("lora_alpha", 0),
        ("lora_alpha", -1), ("lora_alpha", math.nan), ("lora_alpha", 10**400), ("lora_dropout", "x"),
        ("lora_dropout", -0.1), ("lora_dropout", 2), ("bias", "x"), ("modules_to_save", 5), ("exclude_modules", 5),
        ("rank_pattern", {"q_proj": "x"}), ("rank_pattern", 5), ("rank_pattern", {"(": 4}), ("rank_pattern", {"a": -1}),
        ("alpha_pattern", {"q_proj": math.inf}), ("layers_to_transform", "x"), ("use_rslora", "x"),
    ],
    ids=repr,
)  # fmt: skip
def test_values_of_a_lora_config_are_checked_before_a_layer_is_touched(name: str, value: Any) -> None:
    model = patched()
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj"])
    setattr(config, name, value)
    with pytest.raises(KTAMXConfigError, match=rf"^LoraConfig: {name}"):
        get_peft_model(model, config)
    assert not any("lora_" in key for key, _ in model.named_parameters())


def test_a_number_beyond_floats_is_no_alpha() -> None:
    with pytest.raises(KTAMXConfigError, match=r"lora_alpha=1000.* is not a finite number"):
        kt_lora_config(patched(), lora_alpha=10**400)
