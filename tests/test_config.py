"""KTConfig: every field's values are checked when it is made, and a wrong name says what to write instead."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from kt_hf import KTAMXConfigError, KTConfig

GOOD: dict[str, tuple[Any, ...]] = {
    "kt_backend": ("auto", "AMXBF16", "AMXInt8", "AMXInt4", "torch"),
    "kt_num_threads": (None, 1, 60),
    "kt_tp_enabled": (True, False),
    "kt_num_gpu_experts": (0, 2),
    "kt_expert_placement": (None, "auto", "cpu", "gpu", {"resident": 8, "streamed": 16}, {"streamed": 3}),
    "kt_weight_path": (None, "weights", Path("weights")),
    "kt_expert_dtype": ("bf16", "int4", "int8", "fp8"),
    "kt_moe_lora_device": ("auto", "cpu", "gpu"),
    "kt_expert_activations": ("auto", "retain", "recompute"),
    "kt_share_backward_weights": (None, True, False),
    "kt_max_len": (None, 1, 100_000),
    "kt_lora_rank": (None, 0, 1, 1024),
    "kt_expert_ranks": ("auto", "host", "all"),
}
BAD: dict[str, tuple[Any, ...]] = {
    "kt_backend": ("amx", "TORCH", "", None, 3, True),
    "kt_num_threads": (0, -1, 1.5, "4", True),
    "kt_tp_enabled": (None, 1, "yes"),
    "kt_num_gpu_experts": (-1, 1.0, "2", True),
    "kt_expert_placement": (
        "cuda",
        "",
        3,
        True,
        ["cpu"],
        {},
        {"gpu": 3},
        {"resident": -1},
        {"resident": 1, "streamed": 2.0},
        {"streamed": None},
        {"resident": True},
        {3: 4},
    ),
    "kt_weight_path": (3, True, ["weights"]),
    "kt_expert_dtype": ("int3", "bfloat16", None, 4),
    "kt_moe_lora_device": ("cuda", "cuda:0", None),
    "kt_expert_activations": ("keep", None, True),
    "kt_share_backward_weights": ("auto", 0, 1),
    "kt_max_len": (0, -5, 2.0, "64", False),
    "kt_lora_rank": (-1, 1025, 8.0, "8", True),
    "kt_expert_ranks": ("hosts", "", None, 2, True),
}


def pairs(values: dict[str, tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, several in values.items() for value in several]


def test_every_field_has_its_cases() -> None:
    names = [field.name for field in dataclasses.fields(KTConfig)]
    assert names == list(GOOD) == list(BAD)


@pytest.mark.parametrize(("name", "value"), pairs(GOOD))
def test_good_values_are_kept(name: str, value: Any) -> None:
    assert getattr(KTConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(BAD))
@pytest.mark.parametrize("make", [lambda values: KTConfig(**values), KTConfig.from_dict], ids=["init", "from_dict"])
def test_bad_values_are_refused_by_name_and_value(make: Any, name: str, value: Any) -> None:
    with pytest.raises(KTAMXConfigError) as error:
        make({name: value})
    assert str(error.value).startswith(f"{name}={value!r} ")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("kt_num_thread", "kt_num_threads"),
        ("kt_lora_r", "kt_lora_rank"),
        ("num_gpu_experts", "kt_num_gpu_experts"),
        ("kt_max_length", "kt_max_len"),
        ("kt_max_cache_dept", "kt_max_cache_depth"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(KTAMXConfigError, match=rf"{name} is no setting.*Did you mean {meant}\?"):
        KTConfig(**{name: 1})


def test_unlike_name_lists_them_all() -> None:
    with pytest.raises(KTAMXConfigError, match="zzz is no setting") as error:
        KTConfig.from_dict({"zzz": 1})
    assert all(name in str(error.value) for name in GOOD)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("kt_optimize_rule", "apply_kt_moe"), ("cpu_infer", "kt_num_threads"), ("chunk_size", "kt_max_len")],
)
def test_removed_name_says_what_took_its_place(name: str, instead: str) -> None:
    with pytest.raises(KTAMXConfigError, match=rf"{name} is no setting.*{instead}"):
        KTConfig(**{name: 8})


def test_cache_depth_is_ignored_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_hf"):
        assert KTConfig(kt_max_cache_depth=4) == KTConfig()
        assert [record.getMessage() for record in caplog.records if "kt_max_cache_depth=4" in record.getMessage()]
        caplog.clear()
        KTConfig(kt_max_cache_depth=None)
        assert not caplog.records


def test_two_ways_to_place_experts_are_refused() -> None:
    for value in ("cpu", {"resident": 2}):
        with pytest.raises(KTAMXConfigError, match=r"kt_num_gpu_experts=2 and kt_expert_placement=.*leave one out"):
            KTConfig(kt_num_gpu_experts=2, kt_expert_placement=value)
        KTConfig(kt_num_gpu_experts=0, kt_expert_placement=value)


def test_a_placement_is_the_configs_own() -> None:
    given = {"resident": 2}
    config = KTConfig(kt_expert_placement=given)
    given["resident"] = 3
    assert config.kt_expert_placement == {"resident": 2}
    assert hash(config) == hash(copy.deepcopy(config))


def test_frozen() -> None:
    config = KTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kt_backend = "torch"  # type: ignore[misc]
    assert config.kt_backend == "auto"


def test_a_value() -> None:
    config = KTConfig(kt_backend="torch", kt_lora_rank=4)
    assert config == KTConfig("torch", kt_lora_rank=4) != KTConfig("torch")
    assert len({config, KTConfig("torch", kt_lora_rank=4)}) == 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, kt_lora_rank=8).kt_lora_rank == 8
    with pytest.raises(KTAMXConfigError, match="kt_lora_rank"):
        dataclasses.replace(config, kt_lora_rank=-8)
