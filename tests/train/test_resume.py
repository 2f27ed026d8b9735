"""Going on with a run: from the last complete checkpoint, and only with settings that are those of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from kt_hf.errors import KTAMXError
from kt_hf.train.checkpoints import checkpoints, clear_earlier_run, would_be_rotated
from kt_hf.train.config.read import read_arguments
from kt_hf.train.config.yaml_file import BadSettings
from tests.support.resumed import KINDS
from tests.support.train_runs import Runs, forbid_loading, runs_in


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two steps, with a checkpoint after each."""
    runs = runs_in(tmp_path_factory.mktemp("trained"), tiny_model)
    runs.again()
    return runs


@pytest.fixture
def copy(trained: Runs, tiny_model: Path, tmp_path: Path) -> Runs:
    """The same to be changed; its data and model are where they were."""
    shutil.copytree(trained.out, tmp_path / "out")
    runs = runs_in(tmp_path, tiny_model)
    (tmp_path / "run.yaml").write_text(
        (trained.folder / "run.yaml").read_text().replace(str(trained.out), str(runs.out))
    )
    return runs


def test_it_says_from_where_and_the_time_left_is_that_of_its_own_steps(copy: Runs) -> None:
    summary = copy.again("resume_from_checkpoint=true", "max_steps=3")
    assert summary["steps"] == 3
    assert f"Resuming from {copy.out}/checkpoint-2, after step 2" in copy.printed
    assert "going on after step 2 of 3" in copy.printed
    assert "max_steps was 2 and is 3: the run ends there" in copy.printed
    assert "step 3/3" in copy.printed
    assert "step 2/3" not in copy.printed


def test_time_left_goes_by_the_steps_of_this_run() -> None:
    from types import SimpleNamespace

    from rich.console import Console

    from kt_hf.train.progress import ShowProgress

    console = Console(record=True, width=200)
    progress = ShowProgress(console, SimpleNamespace(tokens=0))  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=100, max_steps=120)
    progress.on_train_begin(None, state, None)
    state.global_step, progress.seconds = 110, 20.0
    progress.on_log(None, state, None, logs={"loss": 1.0})
    progress.close()
    assert "0:20 left" in console.export_text()


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("lora_alpha=8", "lora_alpha=8"), ("use_rslora=true", "use_rslora"), ("lora_rank=4", "lora_rank=4"),
        ("lora_target=q_proj", "lora_target"), ("stage=dpo", "stage='dpo'"), ("use_kt=false", "use_kt"),
        ("max_samples=2", "max_samples=2"), ("packing=true", "packing"), ("optim=adafactor", "optim='adafactor'"),
        ("additional_target=lm_head", "additional_target"), ("loraplus_lr_ratio=4", "loraplus_lr_ratio"),
        ("template=alpaca", "template"), ("val_size=1", "val_size"),
    ],
)  # fmt: skip
def test_what_decides_what_is_trained_is_refused_by_name(
    override: str, name: str, copy: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"checkpoint-2.*adapter_name_or_path") as caught:
        copy.again("resume_from_checkpoint=true", override)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_done_its_steps_makes_no_more(steps: int, copy: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=rf"max_steps={steps}: .*checkpoint-2 has done 2, so nothing is left"):
        copy.again("resume_from_checkpoint=true", f"max_steps={steps}")


def test_a_run_whose_best_checkpoint_is_its_result_names_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the Trainer's own end would load it."""
    evaluation = {"val_size": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    runs = runs_in(tmp_path, tiny_model, **evaluation)
    runs.again()
    (runs.out / "kt_hf_summary.json").unlink()
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"nothing is left.* \(the best one is in .*out/checkpoint-[12]\)"):
        runs.again("resume_from_checkpoint=true")


@pytest.mark.parametrize("optim", [[], {}, 5])
def test_a_record_of_a_strange_optimizer_is_told(optim: Any, copy: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    file = copy.out / "checkpoint-2" / "kt_hf_run.json"
    content = json.loads(file.read_text())
    content["settings"]["optim"] = optim
    file.write_text(json.dumps(content))
    with pytest.raises(KTAMXError, match="optim"):
        copy.again("resume_from_checkpoint=true", "max_steps=9")


def test_what_the_checkpoint_lacks_of_modules_to_save_is_told(copy: Runs) -> None:
    (copy.out / "checkpoint-2" / "kt_hf_run.json").unlink()
    with pytest.raises(KTAMXError, match=r"lm_head.*is missing .*modules_to_save"):
        copy.again("resume_from_checkpoint=true", "additional_target=lm_head", "max_steps=9")


def test_another_model_and_other_rows_are_refused(copy: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"^model_name_or_path=.*builtin"):
        copy.again("resume_from_checkpoint=true", "model_name_or_path=builtin:smollm2-moe")
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps({"text": "Other words"}) + "\n")
    with pytest.raises(KTAMXError, match=r"^dataset="):
        copy.again("resume_from_checkpoint=true", f"dataset={data}")
    record = copy.out / "checkpoint-2" / "kt_hf_run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"data": "0" * 64, "rows": 9}))  # the file had other rows then
    with pytest.raises(KTAMXError, match=r"^dataset: its 4 rows are not the 9"):
        copy.again("resume_from_checkpoint=true")


def test_what_changes_without_being_refused_is_told(copy: Runs) -> None:
    changes = (
        "learning_rate=1e-2", "lr_scheduler_type=cosine", "per_device_train_batch_size=1", "seed=1", "packing=false",
        "save_steps=5",
    )  # fmt: skip
    copy.again("resume_from_checkpoint=true", "max_steps=4", *changes)
    assert "learning_rate was the default and is 0.01: it has no effect" in copy.printed
    assert "lr_scheduler_type was the default and is 'cosine': it takes effect from here on" in copy.printed
    assert "per_device_train_batch_size was 2 and is 1: it takes effect" in copy.printed
    assert "seed was the default and is 1: the rows come in another order" in copy.printed
    assert "packing was" not in copy.printed  # false is the default
    assert {path.name for path in checkpoints(copy.out)} == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    rates = {
        float(line.split("  lr ")[1].split()[0]) for line in copy.printed.splitlines() if "  lr " in line
    }  # the checkpoint's, 2e-5, on the new schedule
    assert max(rates) < 2e-5


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])

    return damage


DAMAGES = [
    truncated(name) for name in ("optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth")
]
DAMAGES += [
    lambda folder: (folder / "trainer_state.json").unlink(),
    lambda folder: (folder / "adapter_config.json").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_save_that_was_cut_off_is_left_out_and_told(
    damage: Callable[[Path], None], copy: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_hf.train.resume import find_checkpoint

    damage(copy.out / "checkpoint-2")
    found = find_checkpoint(read_arguments(copy.folder / "run.yaml", ["resume_from_checkpoint=true"]))
    assert found is not None
    assert (found.folder.name, found.step) == ("checkpoint-1", 1)
    assert len(found.notes) == 1
    assert "checkpoint-2 is left out: " in found.notes[0]
    damage(copy.out / "checkpoint-1")
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"no checkpoint in .* is complete"):
        copy.again("resume_from_checkpoint=true")


def test_it_trains_on_from_the_one_before(copy: Runs) -> None:
    truncated("optimizer.pt")(copy.out / "checkpoint-2")
    assert copy.again("resume_from_checkpoint=true", "max_steps=2")["steps"] == 2
    assert "checkpoint-1, after step 1" in copy.printed
    assert "step 2/2" in copy.printed


def test_a_folder_that_is_no_checkpoint_is_refused(
    copy: Runs, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    for folder, reason in ((tiny_model, "trainer_state.json"), (copy.out, "holds checkpoints: give one of them")):
        with pytest.raises(KTAMXError, match=f"no checkpoint of a run: .*{reason}"):
            copy.again(f"resume_from_checkpoint={folder}")
    truncated("optimizer.pt")(copy.out / "checkpoint-1")
    with pytest.raises(KTAMXError, match=r"optimizer.pt is truncated.*last complete one is .*checkpoint-2"):
        copy.again(f"resume_from_checkpoint={copy.out}/checkpoint-1")


def test_only_what_a_training_wrote_is_removed(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-20", "checkpoint-3", "checkpoint-thesis-backup", "checkpoint-20-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").touch()
    (tmp_path / "checkpoint-3" / "thesis.txt").touch()
    (tmp_path / "checkpoint-4").mkdir()  # with nothing to lose
    (tmp_path / "checkpoint-20" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-20-old" / "trainer_state.json").touch()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoint-20", elsewhere)
    (tmp_path / "checkpoint-7").symlink_to(elsewhere)
    assert clear_earlier_run(tmp_path) == 3
    left = {"checkpoint-3", "checkpoint-7", "checkpoint-thesis-backup", "checkpoint-20-old", "elsewhere"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert {path.name for path in would_be_rotated(tmp_path)} == {"checkpoint-3", "checkpoint-7", "checkpoint-20-old"}


def test_rotation_of_the_users_own_folders_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, tiny_model, overwrite_output_dir=True, save_total_limit=1)
    (runs.out / "checkpoint-500-backup").mkdir(parents=True)
    with pytest.raises(BadSettings, match=r"checkpoint-500-backup.*save_total_limit would remove it"):
        read_arguments(tmp_path / "run.yaml")
    assert read_arguments(tmp_path / "run.yaml", ["save_total_limit=null"])


def test_a_checkpoint_of_another_program_is_judged_by_its_adapter(copy: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.out / "checkpoint-2" / "kt_hf_run.json").unlink()
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        with pytest.raises(KTAMXError, match=r"^lora_alpha=8: .*checkpoint-2 was trained with 4"):
            copy.again("resume_from_checkpoint=true", "lora_alpha=8")
    assert copy.again("resume_from_checkpoint=true", "max_steps=3")["steps"] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 5}', "[" * 5000])
def test_a_damaged_record_is_told(content: str, copy: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    (copy.out / "checkpoint-2" / "kt_hf_run.json").write_text(content)
    with pytest.raises(KTAMXError, match=r"kt_hf_run\.json cannot be read"):
        copy.again("resume_from_checkpoint=true")


def test_a_record_without_a_setting_had_its_default(copy: Runs) -> None:
    from kt_hf.train.resume import check_settings, find_checkpoint, record

    file = copy.out / "checkpoint-2" / "kt_hf_run.json"
    content = json.loads(file.read_text())
    del content["settings"]["additional_target"], content["settings"]["template"]
    file.write_text(json.dumps(content))
    settings = read_arguments(copy.folder / "run.yaml", ["resume_from_checkpoint=true"])
    found = find_checkpoint(settings)
    assert found is not None
    assert check_settings(found, record(settings)) == []


def test_names_that_no_trainer_writes_are_no_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-01", "checkpoint-\u0663"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "adapter_config.json").touch()
    assert clear_earlier_run(tmp_path / "out") == 0
    runs_in(tmp_path, tiny_model)
    (tmp_path / "out" / "checkpoint-2").touch()
    with pytest.raises(BadSettings, match=r"has 'checkpoint-2', which is no folder: a checkpoint of that name could"):
        read_arguments(tmp_path / "run.yaml")


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_the_optimizer_computes_as_this_run_says(before: str, after: str) -> None:
    """And not as that of the checkpoint did, whose state it goes on with: `optim` takes effect."""
    import torch

    from kt_hf.train.resume import use_own_kind

    def optimizer(kind: str) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, **KINDS[kind])

    def steps(parameter: torch.nn.Parameter, one: torch.optim.Optimizer) -> None:
        for number in range(3):
            parameter.grad = torch.tensor([0.1, 0.2, -0.3]) * (number + 1)
            one.step()

    parameter, one = optimizer(before)
    steps(parameter, one)
    other, two = optimizer(after)
    other.data.copy_(parameter.data)
    two.load_state_dict(deepcopy(one.state_dict()))
    use_own_kind(two)
    flags = {name: two.param_groups[0][name] for name in ("fused", "foreach")}
    assert flags == {name: two.defaults[name] for name in flags}
    assert two.state[other]["step"] == 3
    steps(parameter, one)
    steps(other, two)
    assert torch.allclose(other, parameter, atol=1e-6)
    assert two.state[other]["step"] == 6
    use_own_kind(torch.optim.SGD([parameter], lr=0.1))
    use_own_kind(torch.optim.Adafactor([parameter], lr=0.1))
