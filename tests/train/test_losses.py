"""Models at whose loss TRL would stop in the first step are refused before; all others are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from kt_hf import KTAMXError
from kt_hf.config import KTConfig
from kt_hf.train.config.settings import RunKeys, TrainSettings
from kt_hf.train.losses import check_loss
from tests.support.families import CLASSES, config_of


def check(family: str, stage: str = "sft", **trainer: Any) -> None:
    with torch.device("meta"):
        outline = getattr(transformers, CLASSES[family])._from_config(config_of(family))
    check_loss(TrainSettings("here", RunKeys(stage=stage), KTConfig(), trainer), outline)


@pytest.mark.parametrize("family", ["deepseek_v4", "granitemoe"])
def test_the_loss_of_routers_that_trl_cannot_compute(family: str) -> None:
    with pytest.raises(KTAMXError, match=r"coef: it is 0.001 .* no num_experts\). Set router_aux_loss_coef: 0"):
        check(family)
    check(family, router_aux_loss_coef=0.0)
    check(family, stage="dpo")


def test_no_hidden_states() -> None:
    with pytest.raises(KTAMXError, match=r"Llama4ForCausalLM has none. Train it by transformers' Trainer"):
        check("llama4")
    check("llama4", stage="orpo")
    config = transformers.Llama4Config(text_config=config_of("llama4"))
    with torch.device("meta"):
        seeing = transformers.Llama4ForConditionalGeneration._from_config(config)
    with pytest.raises(KTAMXError, match=r"Llama4ForConditionalGeneration has none"):
        check_loss(TrainSettings("here", RunKeys(), KTConfig(), {}), seeing)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4", "qwen3_moe", "dbrx"])
def test_others(family: str) -> None:
    check(family)
