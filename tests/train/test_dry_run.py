"""What would fail after the model is loaded is refused before, in a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kt_hf.errors import KTAMXError
from tests.support.train_runs import forbid_loading, runs_in

REFUSED = [
    ("report_to=wandb", "report_to=wandb: .*wandb"),
    ("report_to=[tensorboard, nonsense]", "report_to=(tensorboard|nonsense): "),
    ("optim=lomo", "optim='lomo' cannot be used: .*lomo"),
    ("optim=schedule_free_adamw", "optim='schedule_free_adamw' cannot be used: .*schedulefree"),
    ("optim_args=foo", "^optim_args='foo' cannot be used"),
    ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_type='warmup_stable_decay' cannot be used"),
    ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_type='cosine_with_min_lr' cannot be used: .*min_lr"),
    ("lr_scheduler_kwargs={nix: 1}", "^lr_scheduler_kwargs=.* cannot be used: .*nix"),
    ("padding_free=true", "padding_free"),
    ("eos_token=<nope>", "eos_token='<nope>'"),
    ("pad_token=<nope>", "pad_token='<nope>'"),
    ("loss_type=nonsense", "loss_type='nonsense'"),
    ("torch_compile_backend=foo", "torch_compile_backend='foo' is not known: leave it out, or take one of .*inductor"),
    ("packing_strategy=nix packing=true", "^packing_strategy='nix'"),
    ("push_to_hub=true hub_model_id=a/b/c", "^hub_model_id='a/b/c' cannot be used"),
    ("push_to_hub=true", "^push_to_hub=True cannot be used"),
    ("dataloader_drop_last=true per_device_train_batch_size=64", "per_device_train_batch_size=64: nothing would be"),
    ("chat_template_path=/nowhere", "chat_template_path"),
    ("attn_implementation=nonsense", "nonsense"),
    ("lora_target=nowhere", "lora_target: no module is called 'nowhere'. There are: .*q_proj"),
    ("additional_target=nowhere", "additional_target: no module is called 'nowhere'"),
    ("additional_target=experts", "additional_target: 'experts' reaches .*experts"),
    ("adapter_name_or_path=.", "adapter_config.json is missing"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_it_is_refused(
    override: str, message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forbid_loading(monkeypatch)
    runs = runs_in(tmp_path, tiny_model)
    with pytest.raises(KTAMXError, match=message) as caught:
        runs.again(*re.split(r" (?=\w+=)", override))
    assert "\n  File" not in str(caught.value)
    assert not runs.out.exists()


def test_a_metric_that_is_not_measured(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"metric_for_best_model='nix' is not measured\. There are: .*eval_loss"):
        runs_in(tmp_path, tiny_model).again("val_size=1", "metric_for_best_model=nix")


def test_the_trial_leaves_nothing_behind_and_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    import tempfile

    import torch

    before = set(Path(tempfile.gettempdir()).glob("kt-hf-try-*"))
    runs = runs_in(tmp_path, tiny_model, max_steps=1, save_strategy="no", report_to="none")
    first = runs.again()["loss"]
    assert set(Path(tempfile.gettempdir()).glob("kt-hf-try-*")) <= before
    torch.manual_seed(123)  # what came before does not count: the seed of the run does
    assert runs.again("overwrite_output_dir=true")["loss"] == first
