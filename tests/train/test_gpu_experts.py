"""kt_num_gpu_experts in `kt-hf train`: the experts that the data use most, the same ones after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_hf import KTAMXConfigError, count_experts, read_placement
from kt_hf.placement import PLACEMENT, choice
from kt_hf.placement import packer as packing
from kt_hf.placement.planner import TierPlan
from kt_hf.train.config.read import read_arguments
from kt_hf.train.expert_profile import ProfileRun
from tests.support.checkpoints import make_8_bits
from tests.support.tiny import save_model, trained, write_yaml

ROWS = [{"instruction": f"{n}+{n}?", "output": "a number" * 5} for n in range(6)]


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))


def test_profile_then_the_checkpoints(tmp_path: Path, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = save_model(tmp_path / "model"), []

    def counted(*args: object) -> object:
        seen.append(count_experts(*args))
        return seen[-1]

    monkeypatch.setattr("kt_hf.train.expert_profile.count_experts", counted)
    keys = ("kt_num_gpu_experts=2", "save_strategy=steps", "save_steps=1")
    trained(tmp_path, model, ROWS, *keys)
    assert len(seen) == 1
    for layer, counts in seen[0].items():
        order = read_placement(tmp_path / "out").order[layer]
        assert [int(counts[e]) for e in order] == sorted(counts.tolist(), reverse=True)
        assert len(set(counts.tolist())) > 1, "the routers choose evenly: a weak test"
    first = read_placement(tmp_path / "out/checkpoint-1").order
    trained(tmp_path, model, ROWS, *keys, "max_steps=2", "resume_from_checkpoint=true")
    assert len(seen) == 1, "the resumed run counted again"
    assert read_placement(tmp_path / "out/checkpoint-2").order == first


def test_a_quantised_model_is_not_loaded_whole(
    tmp_path: Path, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its streamed experts stay of 8 bits, and which are used most is not counted, which is told."""
    model, seen = save_model(tmp_path / "model"), []
    make_8_bits(model, (32, 32))
    made = packing.Packer.build

    def watched(*args: Any) -> Any:
        seen.append(args[1].low_bit)
        return made(*args)

    monkeypatch.setattr("kt_hf.train.expert_profile.count_experts", lambda *_: pytest.fail("counted"))
    monkeypatch.setattr(packing.Packer, "build", watched)
    trained(tmp_path, model, ROWS, "kt_expert_placement={resident: 1, streamed: 1}")
    assert [list(one.experts) for one in seen] == [[0, 1], [0, 1]]
    assert "is quantized: it is not loaded whole" in caplog.text
    assert read_placement(tmp_path / "out") is None


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "four"}]},
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "chosen": [{"role": "assistant", "content": "four"}],
            "rejected": [{"role": "assistant", "content": "five"}],
        },
        {"text": "2+2? four"},
        {"prompt": "2+2?", "completion": " four"},
        {"prompt": "2+2?", "chosen": " four", "rejected": " five"},
    ],
    ids=lambda row: "-".join(row),
)
def test_rows_of_every_form_are_counted(row: dict, tmp_path: Path) -> None:
    from rich.console import Console

    from kt_hf.train.data.reading import reading
    from kt_hf.train.data.rows import Rows
    from kt_hf.train.data.tokens import prepare
    from tests.support.tiny import tokenizer

    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    file = write_yaml(tmp_path / "run.yaml", model_name_or_path="builtin:smollm2-moe", output_dir=str(tmp_path / "out"),
                      dataset=str(tmp_path / "data.jsonl"), max_length=30)  # fmt: skip
    settings, words = read_arguments(file), tokenizer()
    how = reading(settings.run, settings.trainer, words, 259)
    data = prepare(Rows([row] * 3), how, "dpo" if "chosen" in row else "sft", "train")
    placing = ProfileRun(settings, data.sequences, Console(quiet=True))
    batches = list(placing.batches())
    assert len(batches) == 3
    text = tokenizer().decode(batches[0][0])
    assert "2+2?" in text
    assert all(batch.shape[1] <= 30 for batch in batches)


def test_three_tiers_and_a_resume_under_others(
    tmp_path: Path, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is the checkpoint's, the numbers are the new run's; auto is planned with the run's tokens."""
    model, keys = save_model(tmp_path / "model"), ("save_strategy=steps", "save_steps=1")
    trained(tmp_path, model, ROWS, "kt_expert_placement={resident: 1, streamed: 1}", *keys)
    content = json.loads((tmp_path / "out/checkpoint-1" / PLACEMENT).read_text())
    assert (content["resident"], content["streamed"]) == (1, 1)
    seen = []
    monkeypatch.setattr(choice, "measure_rates", lambda *_: None)
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)
    monkeypatch.setattr(choice, "plan_tiers", lambda *a: (seen.append(a), TierPlan(0, 2, 2, 1, 1, 1, 1))[1])
    more = ("max_steps=2", "resume_from_checkpoint=true", "kt_expert_placement=auto")
    trained(tmp_path, model, ROWS, *more, "max_length=40", "per_device_train_batch_size=2", *keys)
    assert seen[0][3] == 80
    assert len(seen[0][5]) > 0, "the checkpoint's popularity is not used"
    after = json.loads((tmp_path / "out/checkpoint-2" / PLACEMENT).read_text())
    assert (after["resident"], after["streamed"], after["layers"]) == (0, 2, content["layers"])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("kt_expert_placement=gpu", "kt_expert_placement='gpu': it needs a CUDA GPU"),
        ("kt_expert_placement={streamed: 2}", r"kt_expert_placement={'streamed': 2}: it needs a CUDA GPU"),
        ("kt_expert_placement=gup", r"kt_expert_placement='gup' is not one of .* Did you mean gpu\?"),
    ],
)
def test_placements_that_are_refused_before_loading(
    key: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KTAMXConfigError, match=words):
        trained(tmp_path, tmp_path, ROWS, key)


def test_both_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KTAMXConfigError, match="both say which experts"):
        trained(tmp_path, tmp_path, ROWS, "kt_num_gpu_experts=2", "kt_expert_placement=auto")


def test_without_a_gpu_auto_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trained(tmp_path, save_model(tmp_path / "model"), ROWS, "kt_expert_placement=auto")
    assert not (tmp_path / "out" / PLACEMENT).exists()


def test_without_a_gpu_it_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KTAMXConfigError, match="kt_num_gpu_experts=2: it needs a CUDA GPU"):
        trained(tmp_path, tmp_path, ROWS, "kt_num_gpu_experts=2")
