"""Rows as people have them: what reaches TRL's form, what is told, and what is refused with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.read import read_arguments
from kt_hf.train.data.rows import Rows, load_rows, training_and_evaluation
from tests.support.tiny import write_yaml
from tests.train.test_data import write

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "four"}
FIVE = {"role": "assistant", "content": "five"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def loaded(folder: Path, *rows: Any, stage: str = "sft", name: str = "data.jsonl") -> Rows:
    return load_rows([str(write(folder / name, list(rows)))], "train", stage)


def refused(folder: Path, *rows: Any, stage: str = "sft", name: str = "data.jsonl") -> str:
    with pytest.raises(KTAMXConfigError) as caught:
        loaded(folder, *rows, stage=stage, name=name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # What TRL would render passes through.
        ([USER, {**FOUR, "reasoning_content": "Two."}], [USER, {**FOUR, "reasoning_content": "Two."}]),
        ([USER, {**FOUR, "thinking": "Two."}], [USER, {**FOUR, "thinking": "Two."}]),
        ([{**USER, "name": "Ann"}, FOUR], [{**USER, "name": "Ann"}, FOUR]),
        ([USER, CALLING, {**RESULT, "tool_call_id": "1", "name": "add"}, FOUR],
         [USER, CALLING, {**RESULT, "tool_call_id": "1", "name": "add"}, FOUR]),
        ([{"role": "developer", "content": "Be brief."}, USER, FOUR],
         [{"role": "developer", "content": "Be brief."}, USER, FOUR]),
        # A tool call alone, with null or nothing for content, at the end too.
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [USER, CALLING]),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, RESULT, FOUR],
         [USER, CALLING, RESULT, RESULT, FOUR]),
        ([USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}], [USER, CALLING]),
        ([USER, {"role": "assistant", "tool_calls": [CALL["function"]]}], [USER, CALLING]),
        ([USER, {"role": "assistant", "function_call": CALL["function"]}, {**RESULT, "role": "function"}, FOUR],
         [USER, CALLING, RESULT, FOUR]),
        ([USER, {**FOUR, "tool_calls": None, "reasoning_content": None}], [USER, FOUR]),
        ([USER, {**FOUR, "tool_calls": []}], [USER, FOUR]),
        # Text parts.
        ([{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}, FOUR],
         [USER, FOUR]),
        ([USER, {"role": "assistant", "content": ["fo", "ur"]}], [USER, FOUR]),
        ([USER, {"role": "assistant", "content": [{"type": "output_text", "text": "four"}]}], [USER, FOUR]),
        # Whether an answer is trained, by the names that there are.
        ([USER, {**FOUR, "train": True}], [USER, {**FOUR, "train": True}]),
        ([USER, {**FOUR, "weight": 0}, USER, FOUR], [USER, {**FOUR, "train": False}, USER, FOUR]),
        ([{**USER, "train": False}, {**FOUR, "training": 1}], [USER, {**FOUR, "train": True}]),
    ],
)  # fmt: skip
def test_messages_keep_what_a_template_may_use(given: Any, expected: Any, tmp_path: Path) -> None:
    assert loaded(tmp_path, {"messages": given}).rows == [{"messages": expected}]
    # prompt-completion and preference rows are of the same messages
    if len(expected) == 2:
        (row,) = loaded(tmp_path, {"prompt": given[:1], "completion": given[1:]}).rows
        assert row == {"prompt": expected[:1], "completion": expected[1:]}
        if "train" not in expected[1]:
            pair = {"prompt": given[:1], "chosen": given[1:], "rejected": [FIVE]}
            (row,) = loaded(tmp_path, pair, stage="dpo").rows
            assert row == {"prompt": expected[:1], "chosen": expected[1:], "rejected": [FIVE]}


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        ({"messages": [USER, FOUR]}, "sft"),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]}, "sft"),
        ({"prompt": [USER], "completion": [FOUR]}, "sft"),
        ({"instruction": "2+2?", "output": "four"}, "sft"),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, "dpo"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "dpo"),
        ({"instruction": "2+2?", "chosen": "four", "rejected": "five"}, "dpo"),
        ({"conversations": [{"from": "human", "value": "2+2?"}], "chosen": FOUR, "rejected": FIVE}, "dpo"),
    ],
)
def test_tools_settings_and_system_of_a_row_pass_through(row: dict[str, Any], stage: str, tmp_path: Path) -> None:
    settings = {"enable_thinking": False, "style": None}
    for tools, kwargs in ((TOOLS, settings), (json.dumps(TOOLS), json.dumps(settings))):
        given = row | {"tools": tools, "chat_template_kwargs": kwargs, "system": "Be brief."}
        result = loaded(tmp_path, given, stage=stage)
        (found,) = result.rows
        assert found["tools"] == TOOLS
        assert found["chat_template_kwargs"] == {"enable_thinking": False}
        first = found.get("messages", found.get("prompt"))
        assert first[:2] == [{"role": "system", "content": "Be brief."}, USER]
        assert len(result.notes) == 1
    for nothing in (None, "", "[]", []):
        (found,) = loaded(tmp_path, row | {"tools": nothing}, stage=stage).rows
        assert "tools" not in found


def test_tools_of_parquet_do_not_get_each_others_keys(tmp_path: Path) -> None:
    other = [{"type": "function", "function": {"name": "sub", "description": "Subtracts."}}]
    rows = [{"messages": [USER, CALLING, RESULT, FOUR], "tools": TOOLS}, {"messages": [USER, FOUR], "tools": other}]
    found = loaded(tmp_path, *rows, name="data.parquet").rows
    assert found == rows


def test_llama_factorys_calls_of_functions(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "four"},
    ]  # fmt: skip
    (row,) = loaded(tmp_path, {"conversations": turns, "tools": json.dumps(TOOLS)}).rows
    assert row == {"messages": [USER, CALLING, RESULT, FOUR], "tools": TOOLS}
    turns[1]["value"] = "add(2, 2)"
    assert "line 1: conversations: a function_call is text, and not JSON" in refused(tmp_path, {"conversations": turns})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}, FOUR],
         "content has a part of type 'image', and this trains text models"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, FOUR], "part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}, FOUR], "part of type 'input_audio'"),
        ([{"role": "user", "content": [{"type": "file"}]}, FOUR], "part of unknown type 'file'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}, FOUR], "a part without text"),
        ([{"role": "user", "content": {"text": "a"}}, FOUR], "content is dict, not text"),
        ([{"role": "user", "content": 3}, FOUR], "content is int, not text"),
        ([{"role": "user", "tool_calls": [CALL], "content": "a"}, FOUR], "tool_calls of a message of user"),
        ([USER, {"role": "assistant", "tool_calls": "add"}], "tool_calls is text, and not JSON"),
        ([USER, {"role": "assistant", "tool_calls": {"name": "add"}}], "tool_calls is not a list"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "add"}]}], "without the name of a function"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": []}], "the answer is empty"),
        ([USER, RESULT, FOUR], "the result of a tool that was not called"),
        ([RESULT, FOUR], "it begins with the result of a tool"),
        ([{"role": "system", "content": "a"}], "a system message alone"),
        ([USER, {**FOUR, "train": "yes"}], "train is 'yes', and it must be true or false"),
        ([USER, {**FOUR, "weight": 0.5}], "weight is 0.5"),
        ([{**USER, "train": True}, FOUR], "only answers are trained"),
        ([USER, {**FOUR, "train": False}], "every answer says that it is not to be trained"),
        ([USER, {**FOUR, "train": False, "weight": 1}], "train and weight of a message differ"),
        ([USER, {**FOUR, "training_detail": []}], "training_detail is not supported"),
        ([USER, {**FOUR, "content": "\ud800"}], "half a character ('\\ud800')"),
        ([USER, {**FOUR, "content": "a", "note": "\udfff"}], "half a character"),
        (json.loads("[" * 60 + "]" * 60), "nested deeper than 50 levels"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(messages: Any, reason: str, tmp_path: Path) -> None:
    text = refused(tmp_path, {"messages": messages})
    assert "data.jsonl line 1: " in text
    assert reason in text


@pytest.mark.parametrize("column", ["image", "images", "audio", "video", "videos"])
@pytest.mark.parametrize("row", [{"messages": [USER, FOUR]}, {"text": "a"}])
def test_pictures_and_sound_are_refused_by_name(column: str, row: dict[str, Any], tmp_path: Path) -> None:
    text = refused(tmp_path, row | {column: ["a.png"]})
    assert f"line 1: it has {column}, and this trains text models" in text
    assert loaded(tmp_path, row | {column: []}).rows == [row]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "add"}, "tools is text, and not JSON"),
        ({"tools": ["add"]}, "tools is not a list of descriptions"),
        ({"tools": 3}, "tools is not a list of descriptions"),
        ({"tools": "[" * 900 + "]" * 900}, "nested deeper"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "must not set tokenize"),
        ({"system": 3}, "system is int, not text"),
        ({"system": "\ud800"}, "half a character"),
    ],
)
def test_what_stands_beside_messages_is_checked(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refused(tmp_path, {"messages": [USER, FOUR]} | row)


@pytest.mark.parametrize(
    ("row", "stage", "unused"),
    [
        ({"messages": [USER, FOUR], "id": 3, "source": "web"}, "sft", "id, source"),
        ({"text": "a", "tools": TOOLS}, "sft", "tools"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "sft", "system"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1.0}, "dpo", "score_chosen"),
        ({"messages": [USER, FOUR], "prompt": "a", "chosen": "b", "rejected": "c"}, "sft", "chosen, prompt, rejected"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "sft", "attention_mask"),
    ],
)
def test_columns_that_nobody_uses_are_named_once(row: dict[str, Any], stage: str, unused: str, tmp_path: Path) -> None:
    told = loaded(tmp_path, *[row | {"empty": None}] * 3, stage=stage).notes
    assert len(told) == 2
    assert told[1].endswith(f"nothing uses the columns {unused}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # The whole conversation in the answers, as in ultrafeedback_binarized.
        ({"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ([USER], [FOUR], [FIVE])),
        # Nothing between prompt and answer is lost.
        ({"prompt": "2+2?", "chosen": [USER, FIVE, USER, FOUR], "rejected": [USER, FIVE, USER, FIVE]},
         ([USER, FIVE, USER], [FOUR], [FIVE])),
        ({"chosen": [USER, CALLING, RESULT, FOUR], "rejected": [USER, FIVE]},
         ([USER], [CALLING, RESULT, FOUR], [FIVE])),
        ({"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: five"}, ("Q: 2+2? A: f", "our", "ive")),
        ({"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}, ("Q: 2+2? A:", " 4", " 5")),
    ],
)  # fmt: skip
def test_pairs_of_every_form(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (found,) = loaded(tmp_path, row, stage="dpo").rows
    assert tuple(found.values()) == expected
    if isinstance(row["chosen"], str):
        from trl import extract_prompt

        assert extract_prompt(dict(row)) == found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "two messages of the same speaker"),
        ({"prompt": "2+2?", "chosen": [FOUR], "rejected": [USER]}, "rejected does not end with an answer"),
        ({"prompt": "2+2?", "chosen": "a", "rejected": [FIVE]}, "rejected is list, not text"),
        (
            {"prompt": [USER], "chosen": [{**FOUR, "train": False}], "rejected": [FIVE]},
            "train of a message is for",
        ),
        ({"chosen": "abc", "rejected": "abcd"}, "beginning of the other"),
        ({"chosen": "abc", "rejected": "xyz"}, "there is no prompt"),
        ({"chosen": [USER, FOUR], "rejected": [{**USER, "content": "?"}, FOUR]}, "there is no prompt"),
    ],
)
def test_pairs_that_are_none_are_refused(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refused(tmp_path, row, stage="dpo")


def from_settings(folder: Path, files: dict[str, list[Any]], **settings: Any) -> Rows:
    for name, rows in files.items():
        write(folder / name, rows)
    file = write_yaml(folder / "run.yaml", model_name_or_path="builtin:smollm2-moe", output_dir=str(folder / "out"),
                      dataset=[str(folder / name) for name in files], **settings)  # fmt: skip
    return training_and_evaluation(read_arguments(file))[0]


def test_defaults_of_every_conversation(tmp_path: Path) -> None:
    mine = {"role": "system", "content": "Mine."}
    own = {
        "messages": [mine, USER, FOUR],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    files = {"a.jsonl": [{"messages": [USER, FOUR]}, own], "b.jsonl": [{"prompt": [USER], "completion": [FOUR]}]}
    rows = from_settings(tmp_path, files, default_system="Be brief.", enable_thinking=False).rows
    brief = {"role": "system", "content": "Be brief."}
    assert rows == [
        {"messages": [brief, USER, FOUR], "chat_template_kwargs": {"enable_thinking": False}},
        own,
        {"prompt": [brief, USER], "completion": [FOUR], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    told = from_settings(tmp_path, {"a.jsonl": [{"text": "a"}]}, default_system="Be brief.").notes
    assert told[-1] == "default_system: no effect, for the data are not conversations"


@pytest.mark.parametrize("probs", [None, "0.75,0.25", [0.75, 0.25]])
@pytest.mark.parametrize(("strategy", "least"), [("interleave_under", 1), ("interleave_over", 50), ("concat", 50)])
def test_data_sets_are_mixed(strategy: str, least: int, probs: Any, tmp_path: Path) -> None:
    files = {"a.jsonl": [{"text": f"a{i}"} for i in range(40)], "b.jsonl": [{"text": f"b{i}"} for i in range(10)]}
    settings = {"mix_strategy": strategy} | (
        {} if probs is None or strategy == "concat" else {"interleave_probs": probs}
    )
    rows = from_settings(tmp_path, files, **settings)
    assert len(rows.rows) >= least
    for row, place in zip(rows.rows, rows.places, strict=True):
        assert int(row["text"][1:]) == int(place.split()[-1]) - 1
    first = [row["text"][0] for row in rows.rows[:20]]
    if strategy == "concat":
        assert set(first) == {"a"}
    else:
        assert "of 50 by turns" in rows.notes[-1]
        assert (first == ["a", "b"] * 10) is (probs is None)
    assert rows.rows == from_settings(tmp_path, files, **settings).rows  # by the seed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mix_strategy": "shuffle"}, "mix_strategy='shuffle': it must be concat or interleave_under"),
        ({"interleave_probs": [1.0]}, "interleave_probs is for mix_strategy"),
        ({"mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"}, "has 2 numbers for 1 data sets"),
        ({"mix_strategy": "interleave_over", "interleave_probs": ["a"]}, "must be a number"),
        ({"mix_strategy": "interleave_over", "interleave_probs": [{}]}, "must be a number"),
        ({"mix_strategy": "interleave_over", "interleave_probs": [0.5]}, "add up to 1"),
        ({"mix_strategy": "interleave_over", "interleave_probs": [float("nan")]}, "nan in it must be a number"),
    ],
)
def test_mixing_is_checked_with_the_settings(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=reason):
        from_settings(tmp_path, {"a.jsonl": [{"text": "a"}]}, **settings)


def test_the_text_column_may_have_trls_other_name(tmp_path: Path) -> None:
    files = {"a.jsonl": [{"body": "a", "text": "not this"}]}
    rows = from_settings(tmp_path, files, dataset_text_field="body")
    assert rows.rows == [{"text": "a"}]
    with pytest.raises(KTAMXConfigError, match="no known format has the columns none"):
        from_settings(tmp_path, {"a.jsonl": [{"text": "a"}]}, dataset_text_field="nothing")


@pytest.mark.parametrize("folder", ["nothing", "a.jsonl", "a\0b", "~nobody-of-that-name", "a" * 5000])
def test_a_dataset_dir_that_is_none_is_told(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KTAMXConfigError, match=r"1 problem:\n  line \d+: dataset_dir="):
        from_settings(tmp_path, {"a.jsonl": [{"text": "a"}]}, dataset_dir=folder)


@pytest.mark.parametrize("dataset", [[1, {"a": 2}], ["a.jsonl", None]])
def test_names_of_data_sets_are_text(dataset: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    file = write_yaml(
        tmp_path / "run.yaml", model_name_or_path="builtin:smollm2-moe", output_dir="out", dataset=dataset
    )
    with pytest.raises(KTAMXConfigError, match="it must be text"):
        read_arguments(file)


def test_a_conversation_in_parquet_may_have_times_beside_it(tmp_path: Path) -> None:
    import datetime

    table = pyarrow.Table.from_pylist([{"text": "a", "when": datetime.datetime(2026, 1, 1), "raw": b"a"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = load_rows([str(tmp_path / "a.parquet")], "train", "sft")
    assert rows.rows == [{"text": "a"}]
    table = pyarrow.Table.from_pylist([{"text": b"a"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(KTAMXConfigError, match="row 1: it holds bytes"):
        load_rows([str(tmp_path / "a.parquet")], "train", "sft")
