"""What loading would refuse is refused when saving and before training; full disks, other processes, other loaders."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from kt_hf import KTAMXError, apply_kt_moe, kt_lora_config, verify_adapter
from kt_hf.adapters import MANIFEST, check_checkpoint, check_export, convert, last_complete, start_from
from kt_hf.adapters.manifest import begin, seal
from kt_hf.peft_compat import saving
from kt_hf.system import disk
from tests.support.cases import TORCH_FP32, make_config
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model
from tests.support.saved_models import base_of, difference, fill, loaded
from tests.support.trainers import trainer_for

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint, and the folder of an adapter of it."""
    folder = tmp_path_factory.mktemp("run")
    base = base_of(MIXTRAL, folder / "base", tied=False)
    model = get_peft_model(loaded(base), lora_config(MIXTRAL))
    fill(model)
    model.save_pretrained(folder / "adapter")
    return folder


# Before training


CANNOT_LOAD: dict[str, tuple[Any, str]] = {
    "another method": (
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "no LoRA adapter is trained|'IA3' is not LORA",
    ),
    "a pattern that could take for ever": (
        LoraConfig(target_modules=["q_proj"], rank_pattern={"(k+)+": 4}), "rank_pattern='.*could take for ever",
    ),
    "an alpha that is a text": (
        LoraConfig(target_modules=["q_proj"], alpha_pattern={"k": "8"}), r"alpha_pattern\.k='8' is not a positive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT_LOAD)
def test_what_would_not_load_is_not_trained(name: str, tmp_path: Path) -> None:
    config, reason = CANNOT_LOAD[name]
    base = patched_model(MIXTRAL, TORCH_FP32)
    if "_pattern" in reason:  # a value that is wrong by itself is refused before a layer is touched
        with pytest.raises(KTAMXError, match=reason):
            get_peft_model(base, config)
        return
    model = get_peft_model(base, config)
    with pytest.raises(KTAMXError, match=reason):
        trainer_for(model, tmp_path, max_steps=1).train()
    with pytest.raises(KTAMXError, match=reason):
        model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / MANIFEST).read_text())["complete"] is False


def test_other_variants_on_attention_alone(tmp_path: Path) -> None:
    """DoRA is nothing for experts; of attention it is saved and loaded, and no sum of weights that could be merged."""
    base = base_of(MIXTRAL, tmp_path / "base", tied=False)
    model = get_peft_model(loaded(base), lora_config(MIXTRAL, target_modules=["q_proj"], use_dora=True)).eval()
    fill(model)
    saving.check_trained(model)
    model.save_pretrained(tmp_path / "dora")
    again = PeftModel.from_pretrained(loaded(base), tmp_path / "dora").eval()
    assert torch.equal(logits_of(again, MIXTRAL.inputs()), logits_of(model, MIXTRAL.inputs()))
    with pytest.raises(KTAMXError, match="use_dora=True is no sum"):
        convert(tmp_path / "dora", tmp_path / "merged", to="merged", base=base)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_has_changed_the_base_is_not_merged(init: str, tmp_path: Path) -> None:
    """Such an adapter belongs to weights that no checkpoint has; merged into the base it was silently wrong."""
    base = base_of(MIXTRAL, tmp_path / "base", tied=False)
    config = lora_config(MIXTRAL, target_modules=["q_proj"], init_lora_weights=init)
    get_peft_model(loaded(base), config).save_pretrained(tmp_path / "a")
    with pytest.raises(KTAMXError, match=f"init_lora_weights='{init}' has changed the base"):
        convert(tmp_path / "a", tmp_path / "merged", to="merged", base=base)


def test_another_vocabulary_is_told(tmp_path: Path) -> None:
    """An adapter of a resized model, loaded into one that is not."""
    base = base_of(MIXTRAL, tmp_path / "base", tied=False)
    model = get_peft_model(loaded(base, 3), lora_config(MIXTRAL, modules_to_save=["embed_tokens"]))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(KTAMXError, match=r"resize_token_embeddings\(131\)"):
        PeftModel.from_pretrained(loaded(base), tmp_path / "a")


def test_whole_modules_that_are_missing(tmp_path: Path) -> None:
    """PEFT ends in a KeyError where the file lacks one."""
    base = base_of(MIXTRAL, tmp_path / "base", tied=False)
    get_peft_model(loaded(base), lora_config(MIXTRAL, modules_to_save=["norm"])).save_pretrained(tmp_path / "a")
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**content, "modules_to_save": ["norm", "lm_head"]}))
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(KTAMXError, match=r"is of lm_head too, and lm_head\.weight is missing"):
        PeftModel.from_pretrained(loaded(base), tmp_path / "a")


def test_starting_from_an_adapter_with_whole_modules(tmp_path: Path) -> None:
    base = base_of(MIXTRAL, tmp_path / "base", tied=False)
    config = lora_config(MIXTRAL, modules_to_save=["norm"], trainable_token_indices=[1, 5])
    model = get_peft_model(loaded(base, 3), config).eval()
    fill(model)
    model.save_pretrained(tmp_path / "a")
    other = get_peft_model(loaded(base, 3), config).eval()
    start_from(other, tmp_path / "a")
    assert torch.equal(logits_of(other, MIXTRAL.inputs()), logits_of(model, MIXTRAL.inputs()))


# Without kt_hf's patch


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "from_pretrained": lambda adapter, _: AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda adapter, base: AutoModelForCausalLM.from_pretrained(base).load_adapter(str(adapter)),
    "pipeline": lambda adapter, _: pipeline("text-generation", model=str(adapter), tokenizer=object()),
    "PeftModel": lambda adapter, base: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
}


@pytest.mark.parametrize("name", LOADERS)
def test_an_unpatched_model_does_not_take_a_part(name: str, run: Path) -> None:
    with pytest.raises(ValueError, match=r"LoRA of experts as kt_hf trains it .*no place"):
        LOADERS[name](run / "adapter", run / "base")


def test_the_card_says_how_to_load(run: Path, tmp_path: Path) -> None:
    text = (run / "adapter" / "README.md").read_text()
    assert "It needs kt_hf" in text
    assert "kt-hf export ADAPTER OUTPUT --to peft" in text
    code = re.search(r"```python\n(.*?)```", text[text.index("## How to load") :], re.DOTALL)
    assert code
    lines = code[1].replace('"ADAPTER"', repr(str(run / "adapter"))).replace('"bfloat16"', '"float32"')
    there: dict[str, Any] = {}
    exec(lines.replace('kt_backend="auto"', 'kt_backend="torch"'), there)
    expected = PeftModel.from_pretrained(loaded(run / "base"), run / "adapter").eval()
    assert difference(there["model"].eval(), MIXTRAL.inputs(), logits_of(expected, MIXTRAL.inputs())) < 1e-6
    there["model"].save_pretrained(tmp_path / "again")
    there["model"].save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text().count("## How to load this adapter") == 1


def test_no_section_where_stock_loads_all(tmp_path: Path) -> None:
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "kt_hf" not in (tmp_path / "README.md").read_text()


# Disks


def test_space_is_looked_at_first(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    model = adapted_model(MIXTRAL, TORCH_FP32)
    for write in (
        lambda: model.save_pretrained(tmp_path / "a"),
        lambda: convert(run / "adapter", tmp_path / "b", to="merged", base=run / "base"),
        lambda: convert(run / "adapter", tmp_path / "c", to="peft"),
        lambda: convert(run / "adapter", tmp_path / "d.pt"),
    ):
        with pytest.raises(KTAMXError, match=r"the disk has 1,000 bytes free, and .* are to be written"):
            write()
    assert not any(tmp_path.iterdir())


def test_a_trainer_does_not_begin_a_checkpoint_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter and AdamW's two moments: room for the adapter alone is not enough."""
    model = adapted_model(MIXTRAL, TORCH_FP32)
    size = saving.adapter_bytes(model, "default")
    free = size * 2 + 16 * 2**20
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
    with pytest.raises(KTAMXError, match="Free some and resume"):
        trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write more to a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_becomes_full(run: Path, tmp_path: Path) -> None:
    model = adapted_model(MIXTRAL, TORCH_FP32)
    for name, write in {
        "a": lambda: model.save_pretrained(tmp_path / "a"),
        "b": lambda: convert(run / "adapter", tmp_path / "b", to="merged", base=run / "base"),
        "c": lambda: convert(run / "adapter", tmp_path / "c", to="peft"),
        "d.pt": lambda: convert(run / "adapter", tmp_path / "d.pt"),
    }.items():
        with (
            files_up_to(50_000),
            pytest.raises(KTAMXError, match=rf"/\.?{name}.* could not be written: the disk is full"),
        ):
            write()
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    with pytest.raises(KTAMXError, match="saving was interrupted"):
        verify_adapter(tmp_path / "a")


# Other processes, and folders of any kind


@pytest.mark.parametrize("when", ["tensors", "before the manifest", "before the seal"])
def test_two_processes_in_one_folder(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other one has done, this one does not call the mixture whole."""
    model, original = adapted_model(MIXTRAL, TORCH_FP32, seed=1), saving._check_saved
    ours = saving.begin.__globals__["_MARKS"]

    def other_process(folder: Path) -> None:
        mine = dict(ours)
        begin(folder)
        ours.clear()
        ours.update(mine)

    def checked(model: Any, name: str, file: Path) -> None:
        original(model, name, file)
        if when == "tensors":
            file.write_bytes(file.read_bytes())
        elif when == "before the manifest":
            other_process(file.parent)

    monkeypatch.setattr(saving, "_check_saved", checked)
    if when == "before the seal":
        model.save_pretrained(tmp_path)
        other_process(tmp_path)
    with pytest.raises(KTAMXError, match="another process saves into this folder too"):
        seal(tmp_path) if when == "before the seal" else model.save_pretrained(tmp_path)
    with pytest.raises(KTAMXError, match="saving was interrupted"):
        verify_adapter(tmp_path)


def test_a_run_with_bad_folders(tmp_path: Path) -> None:
    """The last complete checkpoint is found whatever lies beside it."""
    trainer_for(adapted_model(MIXTRAL, TORCH_FP32), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    good = tmp_path / "checkpoint-1"
    for step, content in {
        2: "[" * 200_000,
        3: "[]",
        4: '{"writer": "kt_hf", "format_version": 1, "complete": 8}',
    }.items():
        shutil.copytree(good, tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / MANIFEST).write_text(content)
    for step, name in ((5, CONFIG), (6, "trainer_state.json"), (7, ADAPTER)):
        shutil.copytree(good, tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
        (tmp_path / f"checkpoint-{step}" / name).write_bytes(b"\xff{")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    (tmp_path / f"checkpoint-{'9' * 200}").mkdir()
    (tmp_path / "checkpoint-10").symlink_to("checkpoint-10")
    assert last_complete(tmp_path) == good
    with pytest.raises(KTAMXError, match=r"cannot be resumed: .*The last complete one is .*checkpoint-1:"):
        check_checkpoint(tmp_path / "checkpoint-6")


# Families whose checkpoints name experts otherwise


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
                     "moe_layer_end_index": -1, "moe_num_shared_experts": 1},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 8, "rotary_dim": 4},
    "phimoe": {"num_local_experts": 4},
    "sarvam_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip
NAMES = {"granitemoe": "block_sparse_moe.input_linear", "minimax_m2": "experts.0.w1", "phimoe": "experts.0.w1"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n != "granitemoe" else []) for n in OTHERS]
)
def test_checkpoints_of_other_names(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **OTHERS[name])).float().save_pretrained(base)
    assert any(NAMES.get(name, "experts.0.gate_proj") in key for key in load_file(base / "model.safetensors"))
    patched = apply_kt_moe(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), make_config("torch"))
    model = get_peft_model(patched, kt_lora_config(patched, 4, 8)).eval()
    fill(model)
    model.save_pretrained(tmp_path / "a")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, ids)
    assert difference(loaded(base, patched=False), ids, expected) > 0.1
    merged = convert(tmp_path / "a", tmp_path / "merged", to="merged", base=base)
    check_export(merged, tmp_path / "a", base)
    assert difference(loaded(merged, patched=False), ids, expected) < 1e-5


def test_resume_with_whole_modules(tmp_path: Path) -> None:
    """A run with trained norms and a larger vocabulary, stopped and resumed, ends as one that was not."""
    base = base_of(MIXTRAL, tmp_path / "base", tied=True)

    def trainer(folder: Path) -> Any:
        model = get_peft_model(loaded(base, 3), lora_config(MIXTRAL, modules_to_save=["norm", "embed_tokens"]))
        fill_lora(model, seed=1)
        return trainer_for(model, folder, max_steps=2, save_strategy="steps", save_steps=1)

    first = trainer(tmp_path / "whole")
    first.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    ends = [load_file(tmp_path / part / "checkpoint-2" / ADAPTER) for part in ("whole", "parts")]
    assert set(ends[0]) == set(ends[1])
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
