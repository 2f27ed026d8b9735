"""What is trained of a row: the tokens and labels that TRL's own preparation gives, and what is told beside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, Json
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl import chat_template_utils as trl_templates

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.settings import RunKeys
from kt_hf.train.data.reading import reading
from kt_hf.train.data.rows import Rows
from kt_hf.train.data.tokens import Prepared, prepare
from tests.support.tiny import CHAT, MARKED, tokenizer

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "four"}
FIVE = {"role": "assistant", "content": "five"}
MORE = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "six"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, FOUR]
THOUGHT = [USER, {"role": "assistant", "content": "four", "reasoning_content": "Two and two."}]
QUIET = {"enable_thinking": False}
# Renders everything a conversation may have, and does not mark answers.
ALL = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and enable_thinking != false %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDED = "<|im_end|>\n"


def prepared(rows: list[dict[str, Any]], template: str | None, stage: str = "sft", **settings: Any) -> Prepared:
    keys = {key: settings.pop(key) for key in list(settings) if key in ("mask_history",)}
    how = reading(RunKeys(**keys), settings, tokenizer(template), settings.pop("vocabulary", 259))
    return prepare(Rows(rows), how, stage, "train")


def trained(row: dict[str, Any]) -> str:
    """The text of a row that is trained, its parts apart."""
    words, parts, before = tokenizer(), [], -100
    for label in row["labels"]:
        if label != -100:
            if before == -100:
                parts.append([])
            parts[-1].append(label)
        before = label
    return " + ".join(words.decode(part) for part in parts)


def by_trl(rows: list[dict[str, Any]], template: str | None, masks: bool = False, **settings: Any) -> list[dict]:
    """TRL's own preparation of the same rows, in JSON columns: Arrow's objects would get each other's keys."""
    args = SFTConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True, assistant_only_loss=masks, **settings)
    words = tokenizer(template)
    marked = trl_templates.get_training_chat_template(words) if masks else None
    text = all(isinstance(value, str) for value in rows[0].values())
    given = Dataset.from_list(rows, features=None if text else Features({c: Json() for c in rows[0]}))
    trainer = SimpleNamespace(
        _tokenizer=words, chat_template=marked, completion_only_loss="prompt" in rows[0], args=args,
    )  # fmt: skip
    data = SFTTrainer._prepare_dataset(trainer, given, words, args, False, None, "train")
    return [{column: row[column] for column in ("input_ids", "labels")} for row in data]


@pytest.mark.parametrize(
    ("row", "template", "masks"),
    [
        ({"text": "A story."}, None, False),
        ({"prompt": "2+2=", "completion": "four"}, None, False),
        ({"prompt": [USER], "completion": [FOUR]}, CHAT, False),
        ({"prompt": [USER], "completion": [FOUR]}, ALL, False),
        ({"prompt": CALLED[:3], "completion": CALLED[3:], "tools": [TOOL]}, ALL, False),
        ({"prompt": THOUGHT[:1], "completion": THOUGHT[1:]}, ALL, False),
        ({"prompt": THOUGHT[:1], "completion": THOUGHT[1:], "chat_template_kwargs": QUIET}, ALL, False),
        ({"messages": [USER, FOUR, *MORE]}, MARKED, True),
        ({"messages": [USER, FOUR, *MORE]}, trl_templates.qwen3_chat_template, True),
        ({"messages": CALLED, "tools": [TOOL]}, trl_templates.qwen3_chat_template, True),
        ({"messages": [*THOUGHT, *MORE]}, trl_templates.qwen3_chat_template, True),
        ({"messages": [USER, FOUR, *MORE]}, trl_templates.deepseekv3_chat_template, True),
        ({"messages": [USER, FOUR, *MORE]}, trl_templates.glm4moe_chat_template, True),
    ],
)  # fmt: skip
def test_tokens_and_labels_are_trls(row: dict[str, Any], template: str | None, masks: bool) -> None:
    ours = prepared([row, row], template, max_length=None)
    assert list(ours.dataset) == by_trl([row, row], template, masks, max_length=None)
    cut = len(ours.dataset[0]["input_ids"]) - 2
    theirs = by_trl([row, row], template, masks, max_length=cut)
    assert [{key: value[:cut] for key, value in found.items()} for found in ours.dataset] == theirs
    assert not ours.notes or "enable_thinking" in str(row)  # without its thoughts


@pytest.mark.parametrize("row", [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
    {"prompt": CALLED[:3], "chosen": [FOUR], "rejected": [FIVE], "tools": [TOOL]},
    {"prompt": [USER], "chosen": CALLED[1:], "rejected": [FIVE], "tools": [TOOL]},
])  # fmt: skip
def test_pairs_reach_trl_as_they_are(row: dict[str, Any]) -> None:
    """A second row without anything beside it: it must not get the first one's keys, nor lose its own."""
    other = {"prompt": [USER], "chosen": [FIVE], "rejected": [FOUR]} if isinstance(row["prompt"], list) else row
    ours = prepared([row, other], ALL, "dpo")
    for found, given in zip(ours.dataset, (row, other), strict=True):
        assert {key: value for key, value in found.items() if value} == given
    words = tokenizer(ALL)
    args = DPOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True)
    data = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=words), ours.dataset, words, args, "train")
    text = [words.decode(data[0]["prompt_ids"] + data[0][f"{name}_ids"]) for name in ("chosen", "rejected")]
    if "tools" in row:
        assert all("Adds." in side for side in text)
        assert "Adds." not in words.decode(data[1]["prompt_ids"])
    assert text[0] != text[1]


def test_every_answer_is_trained_where_the_template_renders_a_conversation_as_its_parts() -> None:
    rows = [{"messages": [USER, FOUR, *MORE]}, {"messages": CALLED, "tools": [TOOL]}]
    data = prepared(rows, ALL)
    assert trained(data.dataset[0]) == f"four{ENDED} + six{ENDED}"
    call, answer = trained(data.dataset[1]).split(" + ")
    assert '"arguments": {"a": 2' in call
    assert answer == f"four{ENDED}"
    assert not data.notes


@pytest.mark.parametrize("header", ["<|im_start|>assistant\n<b>", "<|im_start|>assistant\n"])
def test_an_answer_begins_where_the_tokens_part(header: str) -> None:
    """As DeepSeek's: what asks for an answer begins a thought that the conversation does not have."""
    asked = CHAT.replace("<|im_start|>assistant\n{% endif %}", header + "{% endif %}")
    row = {"messages": [USER, {"role": "assistant", "content": "<i>four"}, *MORE]}
    answer = trained(prepared([row], asked).dataset[0]).split(" + ")[0]
    assert answer == f"{'i>' if '<b>' in header else '<i>'}four{ENDED}"  # bytes are tokens here: the < is common


def test_a_question_is_not_trained_where_the_prompt_alone_is_rendered_otherwise() -> None:
    """What asks for the answer has another beginning than the conversation: the answer's own place is not known."""
    other = "{% if add_generation_prompt %}Answer this.{% endif %}" + CHAT
    data = prepared([{"messages": [USER, FOUR, *MORE]}], other)
    header = "<|im_start|>assistant\n"
    assert trained(data.dataset[0]) == f"{header}four{ENDED} + {header}six{ENDED}"


def test_a_tokenizer_without_offsets_trains_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    data = prepared([{"messages": [USER, FOUR, *MORE]}], CHAT)
    assert trained(data.dataset[0]) == f"six{ENDED}"
    assert "only the last of each is trained" in data.notes[0]


@pytest.mark.parametrize("kind", ["file", "tokenizer"])
def test_the_template_of_another_place_is_used(kind: str, tmp_path: Path) -> None:
    """TRL takes it over when its trainer is made; the rows are tokens by then."""
    other = tokenizer(MARKED.replace("im_start|>{{ message.role }}", "im_start|>by {{ message.role }}"))
    other.add_special_tokens({"additional_special_tokens": ["<more>"]})
    source = tmp_path / "other.jinja"
    if kind == "file":
        source.write_text(other.chat_template)
    else:
        source = tmp_path
        other.save_pretrained(source)
    words = tokenizer(CHAT)
    how = reading(RunKeys(), {"chat_template_path": str(source)}, words, 259)
    data = prepare(
        Rows([{"messages": [USER, FOUR | {"content": "<more>" if kind == "tokenizer" else "four"}]}]),
        how,
        "sft",
        "train",
    )
    assert "by user" in words.decode(data.dataset[0]["input_ids"])
    assert (259 in data.dataset[0]["input_ids"]) is (kind == "tokenizer")
    assert words.chat_template == CHAT
    with pytest.raises(KTAMXConfigError, match="chat_template_path='nothing' cannot be used"):
        reading(RunKeys(), {"chat_template_path": "nothing"}, words, 259)


def test_mixtral_trains_all_answers() -> None:
    mixtral = (
        "{{ '<|endoftext|>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert trained(prepared([{"messages": [USER, FOUR, *MORE]}], mixtral).dataset[0]) == (
        " four<|endoftext|> +  six<|endoftext|>"
    )


def test_answers_that_are_rendered_otherwise_later_are_not_trained_and_that_is_told() -> None:
    """As the templates that leave out the thoughts of earlier turns."""
    forgets = ALL.replace("{% if m.reasoning_content", "{% if loop.last and m.reasoning_content")
    rows = [
        {"messages": [*THOUGHT, MORE[0], {**MORE[1], "reasoning_content": "Three."}]},
        {"messages": [USER, FOUR, *MORE]},
    ]
    data = prepared(rows, forgets)
    assert trained(data.dataset[0]) == f"<think>Three.</think>six{ENDED}"
    assert trained(data.dataset[1]) == f"four{ENDED} + six{ENDED}"
    assert "in 1 conversations with several answers only the last of each is trained" in data.notes[0]


@pytest.mark.parametrize("template", [ALL, MARKED])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train": False}, f"six{ENDED}"),
        ({"train": True}, f"four{ENDED} + six{ENDED}"),
    ],
)
def test_an_answer_may_say_that_it_is_not_trained(template: str, flags: dict[str, Any], expected: str) -> None:
    row = {"messages": [USER, FOUR | flags, *MORE]}
    assert trained(prepared([row], template).dataset[0]) == expected
    other = {"messages": [USER, FOUR, MORE[0], MORE[1] | {"train": False}]}
    assert trained(prepared([other], template).dataset[0]) == f"four{ENDED}"


@pytest.mark.parametrize("template", [ALL, MARKED])
def test_mask_history_trains_the_last_answer(template: str) -> None:
    data = prepared([{"messages": [USER, FOUR, *MORE]}], template, mask_history=True)
    assert trained(data.dataset[0]) == f"six{ENDED}"


def test_answers_of_a_prompt_are_not_trained() -> None:
    row = {"prompt": [USER, FOUR, MORE[0]], "completion": [MORE[1]]}
    assert trained(prepared([row], MARKED).dataset[0]) == f"six{ENDED}"
    row = {"prompt": [USER], "completion": [FOUR, *MORE]}
    assert trained(prepared([row], MARKED).dataset[0]) == f"four{ENDED} + six{ENDED}"


@pytest.mark.parametrize("setting", [{"completion_only_loss": False}, {"assistant_only_loss": False}])
def test_prompts_are_trained_when_asked(setting: dict[str, Any]) -> None:
    (row,) = prepared([{"messages": [USER, FOUR, *MORE]}], CHAT, **setting).dataset
    assert row["labels"] == row["input_ids"]


def test_tokens_pass_through() -> None:
    ids = list(range(20))
    row = {"input_ids": ids, "labels": [-100] * 10 + ids[10:]}
    assert prepared([row], None).dataset[0] == row
    for bad in (row | {"input_ids": [*ids[:-1], 259]}, row | {"labels": [-100] * 19 + [300]}):
        with pytest.raises(KTAMXConfigError, match=r"row 1: token (259|300).* none of the model's 259"):
            prepared([bad], None)


def refused(rows: list[dict[str, Any]], template: str | None, stage: str = "sft", **settings: Any) -> str:
    with pytest.raises(KTAMXConfigError) as caught:
        prepared(rows, template, stage, **settings)
    return str(caught.value)


def test_a_prompt_longer_than_the_limit_is_told_and_stops_above_one_percent() -> None:
    long, short = {"prompt": "a" * 60, "completion": "b"}, {"prompt": "a", "completion": "b"}
    data = prepared([short] * 99 + [long], None, max_length=50)
    assert len(data.dataset) == 99
    assert "1 of 100 rows are left out (row 100: nothing of what is trained is within max_length=50" in data.notes[0]
    text = refused([short] * 98 + [long] * 2, None, max_length=50)
    assert "2 of 100 rows cannot be used, more than 1%" in text
    assert "row 99: nothing of what is trained is within max_length=50: it comes after 60 tokens" in text
    assert "10 of 10 rows cannot be used" in refused([long] * 10, None, max_length=50)
    assert len(prepared([long], None, max_length=50, truncation_mode="keep_end").dataset) == 1
    assert len(prepared([long], None, max_length=50, packing=True, packing_strategy="wrapped").dataset) == 1
    assert "1 of 1 rows cannot" in refused([long], None, max_length=50, packing=True)


def test_a_row_that_is_cut_is_told() -> None:
    rows = [{"prompt": "a", "completion": "b" * 60}] * 3 + [{"prompt": "a", "completion": "b"}]
    data = prepared(rows, None, max_length=50)
    assert "3 of 4 rows are longer than max_length=50 tokens and lose the end" in data.notes[0]


def test_pairs_with_nothing_left_to_prefer_are_told() -> None:
    long = {"prompt": "a" * 60, "chosen": "b", "rejected": "c"}
    assert "its prompt has 60 tokens, and max_length=50 leaves none" in refused([long], None, "dpo", max_length=50)
    late = {"prompt": "a", "chosen": "b" * 60 + "c", "rejected": "b" * 60 + "d"}
    assert "the same within max_length=50" in refused([late], None, "dpo", max_length=50)
    chat = {"prompt": [{"role": "user", "content": "a" * 60}], "chosen": [FOUR], "rejected": [FIVE]}
    assert "leaves none for the answers" in refused([chat], CHAT, "dpo", max_length=50)
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = prepared([fine] * 99 + [long], None, "dpo", max_length=50)
    assert len(data.dataset) == 99


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "refuses it"),
        ("{{ 1 / 0 }}", "refuses it"),
        ("{{ messages[0]['content'] + 1 }}", "refuses it"),
    ],
)
def test_a_template_that_raises_is_told_with_the_row(template: str, words: str, stage: str) -> None:
    row = {"messages": [USER, FOUR]} if stage == "sft" else {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
    text = refused([row] * 3, template, stage)
    assert "3 of 3 rows cannot be used" in text
    assert "row 1: the chat template refuses it: " in text
    assert words in text


@pytest.mark.parametrize("row", [{"text": "a<|im_end|>"}, {"prompt": "a", "completion": "<|im_end|>"}])
def test_tokens_beyond_the_embeddings_are_told_with_the_row(row: dict[str, Any]) -> None:
    text = refused([row], None, vocabulary=258)
    assert "row 1: token 258 ('<|im_end|>') is none of the model's 258" in text
    pair = {"prompt": "a", "chosen": "<|im_end|>", "rejected": "b"}
    assert "row 1: token 258" in refused([pair], None, "dpo", vocabulary=258)


def test_an_end_that_the_tokenizer_lacks_is_told() -> None:
    with pytest.raises(KTAMXConfigError, match=r"eos_token='<stop>' is not in the tokenizer's vocabulary"):
        prepared([{"text": "a"}], None, eos_token="<stop>")
    (row,) = prepared([{"text": "a"}], None, eos_token="<|im_end|>").dataset
    assert row["input_ids"][-1] == 258


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": CALLED, "tools": [TOOL]}, "tools"),
        ({"messages": CALLED}, "tool_calls of assistant"),
        ({"messages": THOUGHT}, "reasoning_content of assistant"),
        (
            {"messages": [USER, FOUR], "chat_template_kwargs": {"enable_thinking": True}},
            "enable_thinking of chat_template",
        ),
        ({"messages": [{"role": "developer", "content": "Be brief."}, USER, FOUR]}, "content of developer"),
    ],
)
def test_what_the_template_leaves_out_is_named_once(row: dict[str, Any], name: str) -> None:
    silent = (
        "{% for m in messages if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    told = prepared([row] * 5, silent).notes
    assert len(told) == 1
    assert told[0].startswith("the chat template does not use ")
    assert told[0].count(name) == 1


AS_JSON = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("several", [False, True])  # with several answers TRL's own template for DeepSeek is used
@pytest.mark.parametrize(("template", "words"), [
    (trl_templates.deepseekv3_chat_template, "JSON text: it refuses objects"),
    (AS_JSON, "objects: it writes text as JSON once more"),
    (trl_templates.qwen3_chat_template, ""),
])  # fmt: skip
def test_arguments_are_what_the_template_takes(template: str, words: str, several: bool, stage: str) -> None:
    """Objects and text in the same rows: neither fails, nor is JSON in JSON."""
    calls = [CALL, CALL | {"function": CALL["function"] | {"arguments": '{"a": 7}'}}]
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "4"}]
    row: dict[str, Any] = {"messages": [*turns, FOUR]} if several else {"prompt": turns, "completion": [FOUR]}
    if stage == "dpo":
        row = {"prompt": turns, "chosen": [FOUR], "rejected": [FIVE]}
    data = prepared([row] * 2, template, stage)
    text = tokenizer().decode(data.sequences[0])
    if stage == "dpo":
        args = DPOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True)
        trainer = SimpleNamespace(_tokenizer=tokenizer(template))
        found = DPOTrainer._prepare_dataset(trainer, data.dataset, tokenizer(template), args, "train")[0]
        text = tokenizer().decode(found["prompt_ids"])
    assert '{"a": 2, "b": 2}' in text
    assert '{"a": 7}' in text
    assert [words in told for told in data.notes] == ([True] if words else [])


def test_packed_rows_keep_their_labels() -> None:
    row = {"messages": [USER, FOUR, *MORE]}
    data = prepared([row] * 3, ALL, packing=True, max_length=256)
    args = SFTConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True, packing=True, max_length=256)
    trainer = SimpleNamespace(_tokenizer=tokenizer(ALL), chat_template=None, completion_only_loss=False, args=args)
    (packed,) = SFTTrainer._prepare_dataset(trainer, data.dataset, tokenizer(ALL), args, True, None, "train")
    assert packed["labels"] == data.dataset[0]["labels"] * 3


def test_several_processes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.train.data.tokens._ROWS_PER_PROCESS", 20)
    rows = [{"messages": [USER, FOUR | {"content": str(number)}, *MORE]} for number in range(120)]
    one, two = prepared(rows, ALL), prepared(rows, ALL, dataset_num_proc=2)
    assert one.dataset["labels"][:] == two.dataset["labels"][:]
    refuses = ALL.replace(
        "{% for m in",
        "{% if messages | length == 2 and messages[1].content == 'last' %}{{ nothing.more }}{% endif %}{% for m in",
        1,
    )
    told = prepared([*rows, {"messages": [USER, FOUR | {"content": "last"}]}], refuses, dataset_num_proc=2).notes
    assert "1 of 121 rows are left out (row 121: the chat template refuses it" in told[0]
