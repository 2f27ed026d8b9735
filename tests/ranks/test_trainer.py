"""The stock Trainer on several ranks: as on one process, saved, resumed and told when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from kt_hf import KTAMXConfigError, KTAMXError
from kt_hf.adapters import check_checkpoint, start_from
from kt_hf.adapters.adapter import ADAPTER
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, patched_model, trainable
from tests.support.rank_trainers import Trained, trained, trainer
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results


def on(ranks: int, folder: Path, train: dict[str, Any] | None = None, **settings: Any) -> list[Trained]:
    work = lambda rank: trained(trainer(folder, ranks, **settings), **(train or {}))  # noqa: E731
    return results(on_ranks(ranks, work))


def compare(got: list[Trained], expected: Trained, lora: float = 5e-6, hosts: int = 1) -> None:
    assert len(got[0].losses) == len(expected.losses)
    for mine, reference in ((got[0].losses, expected.losses), (got[0].norms, expected.norms)):
        worst = max(abs(a - b) / abs(b) for a, b in zip(mine, reference, strict=True))
        assert worst <= 1e-6, worst
    parameters = joined([rank.parameters for rank in got], hosts)  # replicated ones are equal to the bit
    worst_of = max((relative(parameters[name], value), name) for name, value in expected.parameters.items())
    assert worst_of[0] <= lora, worst_of


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    expected = trained(trainer(tmp_path / "one", 1, max_steps=4))
    assert max(expected.norms) > 0.5, "nothing is clipped"
    compare(on(2, tmp_path / "two", max_steps=4), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps(ranks: int, tmp_path: Path) -> None:
    compare(on(ranks, tmp_path / "ranks"), trained(trainer(tmp_path / "one", 1)))


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_start_is_what_one_process_draws(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in trainable(adapted_model(MIXTRAL, TORCH_FP32)).items()}

    torch.manual_seed(0)
    one = {name: p.detach().clone() for name, p in trainable(adapted_model(MIXTRAL, TORCH_FP32)).items()}
    parts = joined(results(on_ranks(2, work)))
    assert parts.keys() == one.keys()
    assert all(torch.equal(parts[name], value) for name, value in one.items())


@pytest.mark.slow
def test_checkpoints_are_one_adapter_and_resume_on_any_number(tmp_path: Path) -> None:
    """Six steps at once, or three and three more: the same bits on as many ranks, as good as that on others."""
    runs = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "save_total_limit": None}
    expected = trained(trainer(tmp_path / "one", 1, **runs))
    whole = on(2, tmp_path / "two", **runs)
    compare(whole, expected)
    folders = [tmp_path / name / "checkpoint-3" for name in ("one", "two")]
    one, two = map(saved, folders)
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    assert max(relative(two[key], value) for key, value in one.items()) <= 5e-6
    assert sorted(path.name for path in folders[1].glob("*_*.pt*")) == [
        "kt_experts_optimizer_0.pt", "kt_experts_optimizer_1.pt", "rng_state_0.pth", "rng_state_1.pth",
    ]  # fmt: skip
    check_checkpoint(folders[1])
    for ranks, start in ((2, "two"), (2, "one"), (4, "two"), (1, "two")):
        train = {"resume_from_checkpoint": str(tmp_path / start / "checkpoint-3")}
        target = tmp_path / f"{start}-on-{ranks}"
        if ranks == 1:
            again = [trained(trainer(target, 1, fill=False, **runs), **train)]
        else:
            again = on(ranks, target, train, fill=False, **runs)
        if (ranks, start) == (2, "two"):
            for before, after in zip(whole, again, strict=True):
                assert before.losses[3:] == after.losses[3:]
                assert all(torch.equal(value, after.parameters[name]) for name, value in before.parameters.items())
        compare(again, expected)


@pytest.mark.slow
def test_a_missing_file_of_a_rank_is_named(tmp_path: Path) -> None:
    on(2, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    (tmp_path / "checkpoint-2" / "kt_experts_optimizer_1.pt").unlink()
    with pytest.raises(KTAMXError, match=r"kt_experts_optimizer_1.pt.*checkpoint-1"):
        check_checkpoint(tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_evaluation_with_odd_rows_and_the_best_model(tmp_path: Path) -> None:
    runs = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        "load_best_model_at_end": True, "per_device_eval_batch_size": 1, "learning_rate": 0.1, "save_total_limit": 1,
    }  # fmt: skip
    two = on(2, tmp_path / "two", **runs)
    assert joined([rank.parameters for rank in two])
    best = saved(next((tmp_path / "two").glob("checkpoint-*")))
    assert all(
        torch.equal(value, best[name.replace(".default", "")])
        for name, value in joined([rank.parameters for rank in two]).items()
    )
    evals = [[entry["eval_loss"] for entry in rank.log if "eval_loss" in entry] for rank in two]
    assert evals[0] == evals[1]
    assert len(evals[0]) == 2


@pytest.mark.slow
def test_the_load_of_the_experts_is_that_of_all_ranks(tmp_path: Path) -> None:
    one, two = trained(trainer(tmp_path / "a", 1, max_steps=1)), on(2, tmp_path / "b", max_steps=1)
    for name in ("expert_load_entropy", "experts_without_tokens"):
        assert one.log[0][name] == pytest.approx(two[0].log[0][name], abs=0.05)


def test_saving_in_a_bare_loop_and_loading_again(tmp_path: Path) -> None:
    """All ranks call save_pretrained, rank 0 writes; what is loaded is sliced; an adapter to start from too."""

    def work(rank: int) -> bool:
        model = adapted_model(MIXTRAL, TORCH_FP32)
        fill_whole(model, 5)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), tmp_path / "adapter")
        start = adapted_model(MIXTRAL, TORCH_FP32)
        start_from(start, tmp_path / "adapter")
        wanted = dict(model.named_parameters())
        return all(
            torch.equal(p, wanted[name])
            for other in (again, start)
            for name, p in other.named_parameters()
            if "lora" in name
        )

    assert results(on_ranks(2, work)) == [True, True]
    whole = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(whole, 5)
    whole.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / ADAPTER).read_bytes() == (tmp_path / "adapter" / ADAPTER).read_bytes()


@pytest.mark.slow
def test_accelerates_own_states_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        model = adapted_model(MIXTRAL, TORCH_FP32)
        with pytest.raises(KTAMXConfigError) as error:
            Accelerator(cpu=True).save_state(tmp_path)
        del model
        return str(error.value)

    assert all("rank 0's experts alone" in words for words in results(on_ranks(2, work)))


@pytest.mark.slow
def test_answers_of_unlike_length(tmp_path: Path) -> None:
    def prompt(rank: int) -> Tensor:
        return MIXTRAL.inputs(1, 4 + 3 * rank, seed=5 + rank)

    def answer(model: Any, rank: int) -> Tensor:
        return model.eval().generate(input_ids=prompt(rank), max_new_tokens=4 + 6 * rank, do_sample=False)

    def work(rank: int) -> Tensor:
        model = adapted_model(MIXTRAL, TORCH_FP32)
        fill_whole(model, 1)
        return answer(model, rank)

    one = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(one, 1)
    for rank, value in enumerate(results(on_ranks(2, work))):
        assert torch.equal(value, answer(one, rank))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_the_trainer(reentrant: bool, tmp_path: Path) -> None:
    """DDP would say "marked ready only once" of reentrant checkpointing if it looked for unused parameters."""
    runs = {
        "max_steps": 3, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    expected = trained(trainer(tmp_path / "one", 1, **runs | {"per_device_train_batch_size": 4}))
    compare(on(2, tmp_path / "two", **runs), expected)
