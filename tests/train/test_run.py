"""What a run does with the data and the tokenizer it is given, and what it refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from kt_hf.errors import KTAMXConfigError, KTAMXError
from kt_hf.train import run as run_module
from tests.support.tiny import CHAT, MARKED, save_model, trained

TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "six"},
]


def trained_bytes(text: str) -> tuple[int, int]:
    """(tokens, trained tokens) of the example shown; a token is a byte or a special token."""
    words = text[text.index("The first example, ") :].split()
    return int(words[3]), int(words[5])


def test_only_the_answer_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    _, text = trained(tmp_path, tiny_model, [{"instruction": "2+2?", "output": "four"}] * 4)
    assert "format alpaca" in text
    assert trained_bytes(text)[1] == len("four") + 1 + len("\n")  # and the end of the turn


def test_every_answer_is_trained_where_the_template_marks_them(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MARKED)
    _, text = trained(tmp_path, model, [{"messages": TURNS}] * 4)
    assert trained_bytes(text)[1] == len("four") + len("six") + 2 * (1 + len("\n"))


def test_and_where_it_renders_a_conversation_as_its_parts(tiny_model: Path, tmp_path: Path) -> None:
    _, text = trained(tmp_path, tiny_model, [{"messages": TURNS}] * 4)
    assert trained_bytes(text)[1] == len("four") + len("six") + 2 * (1 + len("\n"))


def test_else_the_last_answer_is_and_that_is_told(tmp_path: Path) -> None:
    once = CHAT.replace("{{ message.content }}", "{{ message.content if loop.last or message.role == 'user' }}")
    model = save_model(tmp_path / "model", once)
    _, text = trained(tmp_path, model, [{"messages": TURNS}] * 4)
    assert "only the last of each is trained" in text
    assert trained_bytes(text)[1] == len("six") + 1 + len("\n")


@pytest.mark.parametrize(("template", "mark"), [("qwen", "<|im_start|>user"), ("alpaca", "### Instruction:")])
def test_a_base_model_gets_a_template_which_is_saved(template: str, mark: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat_template=None)
    _, text = trained(tmp_path, model, [{"messages": TURNS}] * 4, f"template={template}")
    assert "The tokenizer has no chat template" in text
    assert mark in text
    total, answers = trained_bytes(text)
    assert len("foursix") < answers < total / 2  # both answers: the template marks them
    assert mark.split()[0].removesuffix("user") in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_plain_pairs_and_text_need_no_template(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat_template=None)
    _, text = trained(tmp_path, model, [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}] * 4, "stage=dpo")
    assert "chat template" not in text
    assert "The first pair" in text
    summary, text = trained(tmp_path, model, [{"text": "A story."}] * 4, "overwrite_output_dir=true")
    assert summary["loss"] > 0
    total, answers = trained_bytes(text)
    assert total == answers


def test_val_size_is_evaluated_and_lora_target_reaches_what_it_names(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Story {number}."} for number in range(10)]
    summary, _ = trained(tmp_path, tiny_model, rows, "val_size=0.2", "lora_target=q_proj,down_proj", "lora_rank=2")
    assert summary["eval_loss"] > 0
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in file.keys()}  # noqa: SIM118
    assert names == {"q_proj", "down_proj"}


def test_earlier_checkpoints_are_cleared_only_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    old = tmp_path / "out" / "checkpoint-900"
    old.mkdir(parents=True)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    rows = [{"text": "A story."}] * 4
    with pytest.raises(KTAMXConfigError, match="holds an earlier run"):
        trained(tmp_path, tiny_model, rows)
    assert old.exists()
    _, text = trained(tmp_path, tiny_model, rows, "overwrite_output_dir=true")
    assert not old.exists()
    assert (tmp_path / "out" / "mine.txt").exists()
    assert "1 checkpoints of an earlier run are removed" in text


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([{"question": "?"}], (), "no known format"),
        ([{"text": "a"}], ("stage=dpo",), "data for stage: pt or sft"),
        ([{"text": "a"}], ("lora_target=w9",), "no module is called 'w9'"),
    ],
)
def test_what_cannot_be_trained_is_told_and_nothing_is_written(
    rows: list[dict[str, Any]], overrides: tuple[str, ...], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(KTAMXConfigError, match=message):
        trained(tmp_path, tiny_model, rows, *overrides)
    assert not (tmp_path / "out").exists()


def test_a_backend_that_is_not_there_is_told_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(KTAMXError, match=r"AMXInt4.*(hidden size 64|cannot run)"):
        trained(tmp_path, tiny_model, [{"text": "a"}] * 4, "kt_backend=AMXInt4")
    assert not (tmp_path / "out").exists()


def test_short_memory_is_told(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.system.memory.available_memory", lambda *_: 0)
    _, text = trained(tmp_path, tiny_model, [{"text": "a"}] * 4)
    assert "This may need more memory than there is (at most " in text
    assert "gradient checkpointing" in text


def test_bad_data_is_told_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(KTAMXConfigError, match="no known format"):
        trained(tmp_path, tiny_model, [{"question": "?"}])


LOADED = "kt_hf.train.run.load_model"
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tools_reach_the_model(stage: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", WITH_TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    row: dict[str, Any] = {"messages": [TURNS[0], call]}
    if stage == "dpo":
        row = {"prompt": [TURNS[0]], "chosen": [call], "rejected": [TURNS[1]]}
    settings = [f"stage={stage}", "max_length=256", *(["precompute_ref_log_probs=true"] if stage == "dpo" else [])]
    _, text = trained(tmp_path, model, [row | {"tools": [TOOL], "id": 3}] * 4, *settings)
    assert "Adds." in text
    assert '"arguments": {"a": 1}' in text
    assert text.count("nothing uses the columns id") == 1


def test_what_is_left_of_too_long_rows_is_told(tiny_model: Path, tmp_path: Path) -> None:
    long, short = {"prompt": "a" * 300, "completion": "b"}, {"prompt": "a", "completion": "b" * 200}
    _, text = trained(tmp_path, tiny_model, [short] * 100 + [long])
    assert "1 of 101 rows are left out" in text
    assert "100 of 101 rows are longer than max_length=128 tokens and lose the end" in text
    assert "100 examples" in text


@pytest.mark.parametrize(
    ("rows", "overrides", "template", "message"),
    [
        ([{"prompt": "a" * 300, "completion": "b"}], (), CHAT, "4 of 4 rows cannot be used.*max_length=128"),
        ([{"prompt": "a" * 300, "chosen": "b", "rejected": "c"}], ("stage=dpo",), CHAT, "4 of 4 rows.*max_length=128"),
        ([{"messages": TURNS}], (), "{{ raise_exception('no') }}", "line 1: the chat template refuses it: no"),
        (
            [{"messages": [TURNS[0], {"role": "assistant", "content": "\ud800"}]}],
            (),
            CHAT,
            "line 1: it has half a char",
        ),
        ([{"text": "a"}], ("eos_token=<stop>",), CHAT, "eos_token='<stop>' is not in the tokenizer's vocabulary"),
        ([{"messages": TURNS, "images": ["a.png"]}], (), CHAT, "line 1: it has images, and this trains text models"),
        ([{"input_ids": [1, 259]}], (), CHAT, "line 1: token 259 is none of the model's 259"),
    ],
)
def test_rows_that_cannot_be_trained_are_told_before_a_model_is_loaded(
    rows: list[dict[str, Any]], overrides: tuple[str, ...], template: str, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(LOADED, lambda *_: pytest.fail("the model was loaded"))
    model = save_model(tmp_path / "model", template, layers=1)
    with pytest.raises(KTAMXConfigError, match=f"(?s){message}"):
        trained(tmp_path, model, rows * 4, *overrides)
    assert not (tmp_path / "out").exists()


def test_what_terminals_obey_does_not_reach_them(tiny_model: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "\x1b[2J\x1b]0;title\x07?"}, TURNS[1]], "\x1b[31m": "a"}
    _, text = trained(tmp_path, tiny_model, [row] * 4)
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert "\x1b[2J" not in (tmp_path / "log").read_text()


def test_the_fallback_ends_a_turn_once() -> None:
    from kt_hf.train.models import CHAT_TEMPLATES
    from tests.support.tiny import tokenizer

    words = tokenizer(CHAT_TEMPLATES["chatml"])
    assert words.apply_chat_template(TURNS[:2], tokenize=False).endswith("four<|im_end|><|endoftext|>\n")
    words.eos_token = "<|im_end|>"
    assert words.apply_chat_template(TURNS[:2], tokenize=False).endswith("four<|im_end|>\n")
