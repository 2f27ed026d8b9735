"""What experts cannot have is refused by the name of its setting, before PEFT has touched a module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from kt_hf import KTAMXConfigError, KTAMXError
from kt_hf.experts.projections import refuse_variants
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.models import EXPERT_PROJECTIONS
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model, trainable

IDS = MIXTRAL.inputs()
NAMES = ["q_proj", *EXPERT_PROJECTIONS]

# Config -> words of the refusal. Attention is named first, so that a late refusal would find it adapted already.
TUNERS: dict[str, Any] = {
    "IA3Config": lambda **k: IA3Config(feedforward_modules=["down_proj"], **k),
    "AdaLoraConfig": lambda **k: AdaLoraConfig(total_step=10, **k),
    "LoHaConfig": LoHaConfig,
    "LoKrConfig": LoKrConfig,
    "OFTConfig": OFTConfig,
    "VeraConfig": VeraConfig,
    "FourierFTConfig": lambda **k: FourierFTConfig(n_frequency=8, **k),
    "C3AConfig": lambda **k: C3AConfig(block_size=16, **k),
    "RoadConfig": RoadConfig,
}
LORA: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora": ({"use_dora": True}, "use_dora=True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "use_qalora": ({"use_qalora": True}, "use_qalora=True"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\]"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
    "eva": ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
    "mica": ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
    "rank 0": ({"rank_pattern": {"down_proj": 0}}, r"rank_pattern\.down_proj=0 is not a positive"),
    "rank 2.5": ({"rank_pattern": {"up_proj": 2.5}}, r"rank_pattern\.up_proj=2\.5 is not a positive"),
    "layer_replication": ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication=.*leave it out"),
    "modules_to_save, block": (
        {"modules_to_save": ["mlp"]},
        r"modules_to_save=\['mlp'\] would copy model.layers.0.mlp ",
    ),
    "modules_to_save, layer": (
        {"modules_to_save": ["experts"]},
        "modules_to_save=.*mlp.experts .*target_modules",
    ),
    "modules_to_save, one": ({"modules_to_save": ["up_proj"]}, "modules_to_save=.*experts.up_proj.*target_modules"),
    "the whole": ({"target_modules": ["q_proj", "experts"]}, "names model.layers.0.mlp.experts as a whole.*gate_proj"),
    "old regex": ({"target_modules": r".*(q_proj|w1|w3)"}, r"\(w1, w3\).*gate_proj, up_proj now"),
    "fused": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=.*gate_up_proj.*target_modules"),
}


def assert_whole(model: torch.nn.Module, modules: dict[str, Any], expected: torch.Tensor) -> None:
    assert dict(model.named_modules()) == modules, "refused, and yet changed"
    assert torch.equal(logits_of(model, IDS), expected)


def refused(config: Any, words: str) -> None:
    """As the first adapter and as a second one."""
    model = patched_model(MIXTRAL, TORCH_FP32)
    modules, expected = dict(model.named_modules()), logits_of(model, IDS)
    with pytest.raises(KTAMXConfigError, match=words):
        get_peft_model(model, config)
    assert_whole(model, modules, expected)
    if isinstance(config, LoraConfig) and config.peft_type == "LORA":
        model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
        modules, expected, before = dict(model.named_modules()), logits_of(model, IDS), set(trainable(model))
        with pytest.raises(KTAMXConfigError, match=words):
            model.add_adapter("other", config)
        assert_whole(model, modules, expected)
        assert set(trainable(model)) == before
        assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("name", TUNERS)
def test_other_tuners(name: str) -> None:
    config = TUNERS[name](target_modules=NAMES)
    words = rf"experts\.\w+: {name} cannot adapt experts, only LoraConfig can.*target_modules"
    refused(config, words + (".*exclude_modules" if hasattr(config, "exclude_modules") else r"\.$"))


@pytest.mark.parametrize("name", [name for name in TUNERS if name != "IA3Config"])
def test_other_tuners_on_attention_alone(name: str) -> None:
    """As the refusal says."""
    config = TUNERS[name](target_modules=["q_proj"])
    if hasattr(config, "exclude_modules"):
        config = TUNERS[name](target_modules=NAMES, exclude_modules=r".*\.experts\..*")
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), config)
    assert trainable(model)
    assert not [key for key in trainable(model) if ".experts." in key]
    assert torch.isfinite(logits_of(model, IDS)).all()


def test_all_linear_of_another_tuner_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_hf"):
        model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), LoHaConfig(target_modules="all-linear"))
    assert "LoHaConfig: target_modules='all-linear' does not reach experts" in caplog.text
    assert not [key for key in trainable(model) if ".experts." in key]


@pytest.mark.parametrize("name", LORA)
def test_settings_of_lora(name: str) -> None:
    settings, words = LORA[name]
    refused(lora_config(MIXTRAL, **{"target_modules": NAMES, **settings}), words)


def test_every_variant_that_peft_marks_is_known() -> None:
    """A later PEFT's variant is refused too, by the mark its field has."""
    config = lora_config(MIXTRAL)
    for name in ("use_dora", "kasa_config", "arrow_config", "velora_config", "monteclora_config", "use_bdlora"):
        setattr(config, name, SimpleNamespace())
        with pytest.raises(KTAMXConfigError, match=f"here: {name}="):
            refuse_variants(config, "here")
        setattr(config, name, None)
    refuse_variants(config, "here")


@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])
def test_rank_the_operators_have_no_room_for(mark: None) -> None:
    model = adapted_model(MIXTRAL, KERNEL_BF16, seed=1)
    modules, expected = dict(model.named_modules()), logits_of(model, IDS)
    for config in (lora_config(MIXTRAL, r=16), lora_config(MIXTRAL, rank_pattern={"down_proj": 9})):
        with pytest.raises(KTAMXConfigError, match=r"rank (16|9) is larger than the 8.*kt_lora_rank=(16|9)"):
            model.add_adapter("other", config)
        assert_whole(model, modules, expected)


def test_mixed_batches() -> None:
    """adapter_names: the experts would compute the active adapter for every row, and say nothing."""
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1).eval()
    model.add_adapter("other", lora_config(MIXTRAL))
    for call in (model, model.generate):
        with pytest.raises(KTAMXConfigError, match=r"adapter_names=\['default', 'other'\].*set_adapter"):
            call(input_ids=IDS, adapter_names=["default", "other"])
    attention = lora_config(MIXTRAL, target_modules=["q_proj"])
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), attention).eval()
    model.add_adapter("other", attention)
    fill_lora(model, seed=1)
    mixed = model(input_ids=IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0], logits_of(model, IDS)[0])


VERBS: dict[str, tuple[Callable[[PeftModel, Path], Any], str]] = {
    "compiled hotswap": (lambda m, p: prepare_model_for_compiled_hotswap(m, target_rank=16), "kt_lora_rank"),
    "converted": (
        lambda m, p: m.base_model.subtract_mutated_init({}, "default"),
        "path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_verbs(name: str, tmp_path: Path) -> None:
    call, words = VERBS[name]
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    modules, expected = dict(model.named_modules()), logits_of(model, IDS)
    with pytest.raises(KTAMXError, match=words):
        call(model, tmp_path)
    assert_whole(model, modules, expected)


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload", "merge_adapter"])
@pytest.mark.parametrize("how", ["mixed", "another tuner"])
def test_merging_of_other_kinds_of_models(how: str, verb: str) -> None:
    """Also where PEFT does not come through LoraModel: unloading would leave the experts without a layer."""
    model = patched_model(MIXTRAL, TORCH_FP32)
    if how == "mixed":
        model = get_peft_model(model, lora_config(MIXTRAL), mixed=True)
    else:
        model = get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"]))
    modules, expected = dict(model.named_modules()), logits_of(model, IDS)
    with pytest.raises(KTAMXError, match="packed for the CPU operators"):
        getattr(model.base_model, verb)()
    assert_whole(model, modules, expected)
