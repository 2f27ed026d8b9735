"""Files with a module for each expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kt_hf import KTAMXError
from kt_hf.adapters import per_expert
from kt_hf.adapters.adapter import PREFIX, Adapter
from kt_hf.system.files import Lazy


def of_expert(layer: str, projection: str) -> dict[str, Lazy]:
    sizes = {"A": (2, 8), "B": (4, 2)}
    return {
        f"{PREFIX}model.layers.0.{layer}.experts.0.{projection}.lora_{side}.weight": Lazy(
            torch.float32, size, lambda size=size: torch.ones(size)
        )
        for side, size in sizes.items()
    }


def test_one_tensor_under_two_spellings_is_refused() -> None:
    """Each of Mixtral's names is another's alias: which of the two was meant cannot be told."""
    once = of_expert("mlp", "gate_proj")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"]}
    adapter = Adapter(Path("saved"), "per-expert", config)
    per_expert.read(adapter, dict(once))
    assert list(adapter.experts) == ["model.layers.0.mlp.experts.gate_proj"]
    with pytest.raises(KTAMXError, match=r"saved: .*w1\.lora_A\.weight is there twice, under another spelling"):
        per_expert.read(Adapter(Path("saved"), "per-expert", config), once | of_expert("block_sparse_moe", "w1"))
