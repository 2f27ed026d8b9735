"""`kt-hf train` on rows with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from kt_hf import KTAMXConfigError, apply_kt_moe
from kt_hf.train.config.read import read_arguments
from kt_hf.train.data.images import parts_of, with_images
from kt_hf.train.data.messages import BadRow
from kt_hf.train.run import run
from tests.support.cases import make_config
from tests.support.tiny import save_model, write_yaml

pytest.importorskip("torchvision", reason="processors of models that see need it")
from tests.support.seeing import images_in, save_seeing


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing("qwen3_vl_moe", tmp_path_factory.mktemp("seeing"))


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
    summary, text = trained(tmp_path, seeing, [], f"dataset={dataset}", f"eval_dataset={tmp_path / '0.jsonl'}")
    assert "The first example, with 1 images" in text
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert summary["eval_loss"] < losses[0]
    _reloads(seeing, tmp_path / "out", "Qwen3VLMoeForConditionalGeneration")


def _reloads(base: Path, adapter: Path, kind: str) -> None:
    model = apply_kt_moe(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), make_config("torch"))
    assert type(model).__name__ == kind
    model = PeftModel.from_pretrained(model, adapter)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora
    assert not [name for name in lora if "visual" in name or "vision" in name]
    saved = load_file(adapter / "adapter_model.safetensors")
    assert len(saved) == len(lora)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in lora.items())


@pytest.mark.slow
def test_gemma_4(tmp_path: Path) -> None:
    """Whose layers differ in their heads, which the estimate before it has to read."""
    names, base = images_in(tmp_path, 2), save_seeing("gemma4", tmp_path / "base")
    _, text = trained(tmp_path, base, [FORMS["parts"](name) for name in names] * 2)
    assert "The first example, with 1 images" in text
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    _reloads(base, tmp_path / "out", "Gemma4ForConditionalGeneration")


def test_the_tower_is_trained_as_it_is_named(seeing: Path, tmp_path: Path) -> None:
    (name,) = images_in(tmp_path, 1)
    trained(tmp_path, seeing, [FORMS["parts"](name)] * 2, "lora_target=qkv,q_proj,gate_proj", "max_steps=1")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "qkv" in str(config["target_modules"])


WRONG = {
    "no file": (row("<image>a", images=["none.png"]), "there is no image 'none.png' (looked for in "),
    "too few": (row("<image><image>a", images=["0.png"]), "have more <image> than the 1 images"),
    "too many": (row("<image>a", images=["0.png", "0.png"]), "it has 2 images and 1 <image>"),
    "address": (row([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]), "is no file: download it"),
    "no image": (row("<image>a", images=["text.png"]), "cannot be opened"),
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
    monkeypatch.setattr("kt_hf.train.run.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(KTAMXConfigError) as error:
        trained(tmp_path, seeing, [wrong])
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["packing=true", "stage=dpo", "assistant_only_loss=true"])
def test_settings_that_do_not_go_with_images(override: str, seeing: Path, tmp_path: Path) -> None:
    names = images_in(tmp_path, 1)
    with pytest.raises(KTAMXConfigError, match=override.split("=")[0]):
        trained(tmp_path, seeing, [FORMS["placeholder"](names[0])], override)


def test_a_text_model_refuses_images(tmp_path: Path) -> None:
    names = images_in(tmp_path, 1)
    with pytest.raises(KTAMXConfigError, match="it has images, and this trains text models"):
        trained(tmp_path, save_model(tmp_path / "model"), [FORMS["placeholder"](names[0])])


def test_text_alone_trains_a_model_that_sees(seeing: Path, tmp_path: Path) -> None:
    summary, _ = trained(tmp_path, seeing, [row("a"), row("b")], "max_steps=1")
    assert summary["steps"] == 1


def test_order_of_images(tmp_path: Path) -> None:
    """Parts and placeholders of several messages take the images in turn."""
    images_in(tmp_path, 3)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and <image>"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "c"}]},
    ]
    done = with_images({"messages": messages, "images": ["2.png", "0.png"]}, tmp_path)
    assert [Path(image).name for image in done["images"]] == ["2.png", "0.png", "1.png"]
    assert parts_of("a<image><image>b") == [
        {"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "b"}
    ]  # fmt: skip
    with pytest.raises(BadRow, match="int, which is no image"):
        with_images({"messages": messages, "images": [3]}, tmp_path)
