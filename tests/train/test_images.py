"""`kt-hf train` on rows with images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from kt_hf import KTAMXConfigError, apply_kt_moe
from kt_hf.adapters import convert
from kt_hf.train.config.read import read_arguments
from kt_hf.train.next_steps import loading_lines
from kt_hf.train.run import run
from tests.support.cases import make_config
from tests.support.reference import relative_error
from tests.support.tiny import environment, save_model, write_yaml

pytest.importorskip("torchvision", reason="processors of models that see need it")
from tests.support.seeing import FAMILIES, images_in, save_seeing


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing("qwen3_vl_moe", tmp_path_factory.mktemp("seeing"))


# GLM-4.5V's TRL cannot compute; without it a run's loss is that of the answers alone.
NO_ROUTER_LOSS = "router_aux_loss_coef=0"


def row(text: Any, answer: str = "red", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


def trained(folder: Path, model: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[dict[str, Any], str]:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = write_yaml(
        folder / "run.yaml",
        model_name_or_path=str(model), dataset=str(folder / "data.jsonl"), output_dir=str(folder / "out"), max_steps=6,
        logging_steps=1, per_device_train_batch_size=2, kt_backend="torch", save_strategy="no", learning_rate=0.02,
        activation_checkpointing=False, torch_dtype="float32", lora_rank=4, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    console = Console(record=True, width=300, file=(folder / "log").open("w"))
    return run(read_arguments(file, overrides), console), console.export_text()


FORMS = {
    "parts": lambda name: row([{"type": "image", "image": name}, {"type": "text", "text": "What color?"}]),
    "placeholder": lambda name: row("<image>What color?", images=[name]),
    "sharegpt": lambda name: {
        "conversations": [{"from": "human", "value": "<image>What color?"}, {"from": "gpt", "value": "red"}],
        "images": [name],
    },
    "no placeholder": lambda name: row("What color?", image=name),
}


def test_trains_and_loads(seeing: Path, tmp_path: Path) -> None:
    """All forms in one run: the loss falls, the tower is left alone, the adapter loads and says the same."""
    names = images_in(tmp_path, 4)
    for part, (form, name) in enumerate(zip(("parts", "placeholder", "no placeholder"), names, strict=False)):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(FORMS[form](name)) + "\n")
    (tmp_path / "3.jsonl").write_text(json.dumps(FORMS["sharegpt"](names[3])) + "\n")
    dataset = ",".join(str(tmp_path / f"{part}.jsonl") for part in range(4))
    more = f"dataset={dataset}", f"eval_dataset={tmp_path / '0.jsonl'}", NO_ROUTER_LOSS
    summary, text = trained(tmp_path, seeing, [], *more)
    assert "The first example, with 1 images" in text
    _learned(tmp_path / "out")
    _reloads(seeing, tmp_path / "out", FORMS["parts"](names[0]), summary["eval_loss"])


def _learned(folder: Path) -> None:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def _reloads(base: Path, adapter: Path, evaluated: dict[str, Any], loss: float) -> None:
    """The adapter, none of it in the tower, gives a model loaded anew the loss that its run ended with."""
    model = apply_kt_moe(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), make_config("torch"))
    assert type(model).__name__ in [parts.kind for parts in FAMILIES.values()]
    model = PeftModel.from_pretrained(model, adapter).eval()
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora
    assert not [name for name in lora if "visual" in name or "vision" in name]
    saved = load_file(adapter / "adapter_model.safetensors")
    assert len(saved) == len(lora)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in lora.items())
    processor = AutoProcessor.from_pretrained(base)
    (one,) = evaluated["messages"][0]["content"][:1]
    picture = Image.open(adapter.parent / one["image"])
    question = [{"type": "image"}, *evaluated["messages"][0]["content"][1:]]
    messages = [{"role": "user", "content": question}, _said(evaluated["messages"][1])]
    asked, whole = (
        processor.apply_chat_template(part, tokenize=False, add_generation_prompt=len(part) == 1)
        for part in (messages[:1], messages)
    )
    before, batch = (processor(images=[picture], text=[text], return_tensors="pt") for text in (asked, whole))
    labels = batch["input_ids"].clone()
    labels[:, : before["input_ids"].shape[1]] = -100
    result = model(**batch, labels=labels)
    assert result.loss.item() == pytest.approx(loss, rel=1e-3)
    _exports(base, adapter, batch, result.logits)


@torch.no_grad()
def _exports(base: Path, adapter: Path, batch: Any, wanted: Tensor) -> None:
    """In stock PEFT, and merged into the checkpoint, it computes the same of an image."""
    folders = {to: convert(adapter, adapter.parent / to, to=to, base=base) for to in ("peft", "merged")}
    stock = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = stock.eval()(**batch).logits
    stock = PeftModel.from_pretrained(stock, folders["peft"]).eval()
    merged = AutoModelForImageTextToText.from_pretrained(folders["merged"], dtype=torch.float32).eval()
    assert relative_error(before, wanted) > 0.01
    assert relative_error(stock(**batch).logits, wanted) < 1e-5
    assert relative_error(merged(**batch).logits, wanted) < 1e-5
    AutoProcessor.from_pretrained(folders["merged"])


def _said(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_vl_moe"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """With one image, several and none in a batch; Gemma's layers differ in heads, which the estimate has to read."""
    names, base = images_in(tmp_path, 2), save_seeing(family, tmp_path / "base")
    two = row("<image>or <image>?", "green", images=names)
    rows = [FORMS["parts"](names[0]), two, FORMS["placeholder"](names[1]), row("no image", "blue")]
    (tmp_path / "eval.jsonl").write_text(json.dumps(FORMS["parts"](names[0])) + "\n")
    more = f"eval_dataset={tmp_path / 'eval.jsonl'}", "max_steps=10", NO_ROUTER_LOSS
    summary, text = trained(tmp_path, base, rows, *more)
    assert "The first example, with 1 images" in text
    _learned(tmp_path / "out")
    _reloads(base, tmp_path / "out", FORMS["parts"](names[0]), summary["eval_loss"])


TOWERS = {
    "qwen3_vl_moe": ("qkv", "visual.blocks.0.attn.qkv"),
    "qwen3_5_moe": ("qkv", "visual.blocks.0.attn.qkv"),
    "glm4v_moe": ("qkv", "visual.blocks.0.attn.qkv"),
    "gemma4": (*["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"] * 2,),
}


@pytest.mark.parametrize("family", ["qwen3_vl_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in [*TOWERS][1:])])
def test_the_tower_is_trained_as_it_is_named(family: str, tmp_path: Path) -> None:
    (name,), base = images_in(tmp_path, 1), save_seeing(family, tmp_path / "base")
    target, reached = TOWERS[family]
    trained(
        tmp_path, base, [FORMS["parts"](name)] * 2, f"lora_target={target},gate_proj", "max_steps=2", NO_ROUTER_LOSS
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    both = [tensor for name, tensor in tensors.items() if f"{reached}.lora_" in name]
    assert len(both) == 2
    assert all(tensor.any() for tensor in both)  # B begins at zero
    assert any(".experts." in name for name in tensors)


WRONG = {
    "no file": (row("<image>a", images=["none.png"]), "there is no image 'none.png' (looked for in "),
    "too few": (row("<image><image>a", images=["0.png"]), "have more <image> than the 1 images"),
    "too many": (row("<image>a", images=["0.png", "0.png"]), "it has 2 images and 1 <image>"),
    "address": (row([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]), "is no file: download it"),
    "no image": (row("<image>a", images=["text.png"]), "text.png cannot be opened: cannot identify image file"),
    "cut off": (row("<image><image>a", images=["0.png", "cut.png"]), "cut.png cannot be opened: image file is trunc"),
    "no base64": (row("<image>a", images=["data:image/png;base64,?"]), "is not base64"),
    "nothing": (row("<image>a", images=[{"bytes": None, "path": None}]), "has neither bytes nor a path"),
    "tools": (row("<image>a", images=["0.png"], tools=[{"name": "a"}]), "it has tools, which TRL does not give to"),
    "untrained": (
        {
            "messages": [
                *row("<image>a")["messages"],
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c", "train": False},
            ],
            "images": ["0.png"],
        },
        "its last answer is not to be trained",
    ),
    "too long": (row("<image>" + "a" * 2000, images=["0.png"]), "an image cannot be cut: max_length=1024"),
    "alpaca": ({"instruction": "a", "output": "b", "images": ["0.png"]}, "it has images, which go with messages"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_the_model_is_loaded(
    name: str, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, message = WRONG[name]
    images_in(tmp_path, 1)
    (tmp_path / "text.png").write_text("text")
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    monkeypatch.setattr("kt_hf.train.run.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(KTAMXConfigError) as error:
        trained(tmp_path, seeing, [wrong] if name == "alpaca" else [row("good"), wrong])
    assert message in str(error.value)
    assert f"{tmp_path / 'data.jsonl'} line {1 if name == 'alpaca' else 2}: " in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["packing=true", "stage=dpo", "assistant_only_loss=true", "enable_thinking=false", "completion_only_loss=false"],
)
def test_settings_that_do_not_go_with_images(override: str, seeing: Path, tmp_path: Path) -> None:
    names = images_in(tmp_path, 1)
    with pytest.raises(KTAMXConfigError, match=override.split("=")[0]):
        trained(tmp_path, seeing, [FORMS["placeholder"](names[0])], override)


def test_a_text_model_refuses_images(tmp_path: Path) -> None:
    names = images_in(tmp_path, 1)
    with pytest.raises(KTAMXConfigError, match="it has images, and this trains text models"):
        trained(tmp_path, save_model(tmp_path / "model"), [FORMS["placeholder"](names[0])])


@pytest.mark.parametrize("use_kt", [True, False])
def test_the_program_that_is_shown_runs(
    use_kt: bool, seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model's class for images, for which the adapter's names are, and its tokenizer."""
    names, more = images_in(tmp_path, 1), [f"use_kt={use_kt}", "lora_target=q_proj", "max_steps=1"]
    trained(tmp_path, seeing, [FORMS["parts"](names[0])], *more)
    settings = read_arguments(tmp_path / "run.yaml", [*more, "overwrite_output_dir=true"])
    lines = loading_lines(settings, str(tmp_path / "out"), 4, chats=True)
    scope: dict[str, Any] = {}
    exec("\n".join(lines).replace("max_new_tokens=64", "max_new_tokens=2"), scope)
    assert type(scope["model"].get_base_model()).__name__ == "Qwen3VLMoeForConditionalGeneration"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lora = {name.replace(".default", ""): p for name, p in scope["model"].named_parameters() if "lora_" in name}
    assert all(torch.equal(lora[name], value) for name, value in saved.items())
    assert capsys.readouterr().out


def test_text_alone_trains_a_model_that_sees(seeing: Path, tmp_path: Path) -> None:
    summary, _ = trained(tmp_path, seeing, [row("a"), row("b")], "max_steps=1")
    assert summary["steps"] == 1


@pytest.mark.parametrize("broken", [False, True])
def test_no_processor(broken: bool, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = shutil.copytree(seeing, tmp_path / "base")
    file = base / "processor_config.json"
    file.unlink()
    if broken:
        file.write_text("{")
    monkeypatch.setattr("kt_hf.train.run.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(KTAMXConfigError, match="the data have images, and its processor cannot be made: "):
        trained(tmp_path, base, [FORMS["placeholder"](images_in(tmp_path, 1)[0])])


def test_a_loss_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4.5V's configuration has not what TRL needs for its routers' loss, which it has on."""
    if not hasattr(AutoConfig.for_model("glm4v_moe").get_text_config(), "output_router_logits"):
        pytest.skip(f"transformers {transformers.__version__} leaves the loss of GLM-4.5V's routers off under TRL")
    base = save_seeing("glm4v_moe", tmp_path / "base")
    monkeypatch.setattr("kt_hf.train.run.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(KTAMXConfigError, match=r"of its routers .* Set router_aux_loss_coef: 0"):
        trained(tmp_path, base, [FORMS["placeholder"](images_in(tmp_path, 1)[0])])


@pytest.mark.slow
def test_no_torchvision(seeing: Path, tmp_path: Path) -> None:
    """Which the processors of models that see need: said before the model is loaded."""
    (tmp_path / "data.jsonl").write_text(json.dumps(FORMS["placeholder"](images_in(tmp_path, 1)[0])))
    file = write_yaml(
        tmp_path / "run.yaml",
        model_name_or_path=str(seeing),
        dataset="data.jsonl",
        output_dir="out",
        kt_backend="torch",
    )
    hidden = "import importlib.util as u, sys\nfind = u.find_spec\n" + (
        "u.find_spec = lambda name, *rest: None if name.split('.')[0] == 'torchvision' else find(name, *rest)\n"
        "sys.modules['torchvision'] = None\nfrom kt_hf.cli import app\napp()"
    )
    command = [sys.executable, "-c", hidden, "train", str(file)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "its processor cannot be made: " in done.stderr
    assert "requires the Torchvision library" in done.stderr
    assert "Loading the model" not in done.stdout
    assert not (tmp_path / "out").exists()
