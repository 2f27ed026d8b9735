"""Each format of data from a file of the kind it comes in, and its malformed twin."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.data.rows import load_rows, split_off

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = [{"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}]

# name, stage, row, what it becomes, a malformed row, why it is refused
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    (
        "alpaca", "sft",
        {"instruction": "2+2?", "input": "", "output": "4", "system": "Be brief.", "history": []},
        {"messages": [SYSTEM, USER, FOUR]},
        {"instruction": "2+2?", "input": "", "output": "", "system": "", "history": []}, "output is empty",
    ),
    (
        "alpaca", "sft",
        {"instruction": "And", "input": "3+3?", "output": "6", "history": [["2+2?", "4"]]},
        {"messages": [USER, FOUR, {"role": "user", "content": "And\n3+3?"}, AGAIN[1]]},
        {"instruction": "And", "input": "3+3?", "output": "6", "history": [["2+2?"]]}, "history is not a list of",
    ),
    (
        "sharegpt", "sft",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
        {"messages": [SYSTEM, USER, FOUR]},
        {"conversations": [{"from": "robot", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "unknown from 'robot'",
    ),
    (
        "sharegpt", "sft",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [USER, FOUR]},
        {"conversations": [{"from": "gpt", "value": "4"}, {"from": "human", "value": "2+2?"}]}, "begins with an answer",
    ),
    (
        "messages", "sft", {"messages": [SYSTEM, USER, FOUR, *AGAIN]}, {"messages": [SYSTEM, USER, FOUR, *AGAIN]},
        {"messages": [SYSTEM, USER, FOUR, AGAIN[0]]}, "does not end with an answer",
    ),
    (
        "messages", "sft", {"messages": [USER, FOUR]}, {"messages": [USER, FOUR]},
        {"messages": [USER, USER, FOUR]}, "two messages of the same speaker in a row",
    ),
    (
        "prompt and completion", "sft", {"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"},
        {"prompt": "2+2=", "completion": ""}, "completion is empty",
    ),
    (
        "prompt and completion", "sft",
        {"prompt": [USER], "completion": [FOUR]}, {"prompt": [USER], "completion": [FOUR]},
        {"prompt": [USER], "completion": [{"role": "assistant"}]}, "completion: a message without content",
    ),
    ("text", "sft", {"text": "A story."}, {"text": "A story."}, {"text": "   "}, "text is empty"),
    (
        "preference pairs", "dpo", {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "4"}, "chosen and rejected are the same",
    ),
    (
        "preference pairs", "dpo", {"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [USER]}, "rejected does not end with an answer",
    ),
    (
        "preference pairs without prompt", "dpo", {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": [USER, FOUR], "rejected": [AGAIN[0], FIVE]}, "there is no prompt",
    ),
    (
        "alpaca ranking", "dpo", {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"instruction": "", "input": "", "chosen": "4", "rejected": "5"}, "instruction is empty",
    ),
    (
        "sharegpt ranking", "dpo",
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"},
        },
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "human", "value": "5"},
        },
        "rejected does not end with an answer",
    ),
    ("preference pairs", "rm", {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
     {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
     {"prompt": [USER], "chosen": [FOUR], "rejected": [FOUR]}, "chosen and rejected are the same"),
    ("preference pairs", "orpo", {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
     {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
     {"prompt": "2+2=", "chosen": "4", "rejected": ""}, "rejected is empty"),
    ("text", "pt", {"text": "A story."}, {"text": "A story."}, {"text": ""}, "text is empty"),
    (
        "marked prompt and completion", "kto", {"prompt": "2+2=", "completion": "4", "label": True},
        {"prompt": "2+2=", "completion": "4", "label": True},
        {"prompt": "2+2=", "completion": "4", "label": "good"}, "label is 'good': write true for a good answer, false",
    ),
    (
        "marked messages", "kto", {"messages": [USER, FIVE], "label": False},
        {"prompt": [USER], "completion": [FIVE], "label": False},
        {"messages": [USER, FIVE], "label": None}, "label is missing: write true for a good answer, false",
    ),
    (
        "marked sharegpt", "kto",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "kto_tag": 1},
        {"prompt": [USER], "completion": [FOUR], "label": True},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "kto_tag": 2},
        "kto_tag is 2: write true",
    ),
    (
        "marked alpaca", "kto", {"instruction": "2+2?", "output": "5", "kto_tag": "false"},
        {"prompt": [USER], "completion": [FIVE], "label": False},
        {"instruction": "2+2?", "output": "", "kto_tag": "false"}, "output is empty",
    ),
    ("prompts", "grpo", {"prompt": [USER], "answer": "4"}, {"prompt": [USER], "answer": "4"},
     {"prompt": [USER, FOUR], "answer": "4"}, "it ends with an answer, and a prompt ends with a question"),
    ("prompts", "grpo", {"prompt": "2+2=", "answer": "4"}, {"prompt": "2+2=", "answer": "4"},
     {"prompt": " ", "answer": "4"}, "prompt is empty"),
    ("alpaca prompts", "grpo", {"instruction": "2+2?", "output": "4"}, {"prompt": [USER], "output": "4"},
     {"instruction": "", "output": "4"}, "instruction is empty"),
    ("messages of prompts", "grpo", {"messages": [SYSTEM, USER]}, {"prompt": [SYSTEM, USER]},
     {"messages": [SYSTEM]}, "there is a system message alone"),
]  # fmt: skip
IDS = [f"{case[0]}-{index}" for index, case in enumerate(CASES)]


def write(file: Path, rows: list[Any]) -> Path:
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return file


def kinds(row: dict[str, Any]) -> list[str]:
    flat = all(isinstance(value, str) for value in row.values())
    return [".json", ".jsonl", ".parquet", *([".csv"] if flat else [])]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_format_is_recognised_by_its_columns(case: Any, tmp_path: Path) -> None:
    name, stage, row, expected, _, _ = case
    for kind in kinds(row):
        file = write(tmp_path / f"data{kind}", [row, row])
        found = load_rows([str(file)], "train", stage)
        assert found.rows == [expected, expected], kind
        assert found.notes == [f"{file}: 2 rows, format {name}"]
        file.unlink()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_its_malformed_twin_is_refused_above_one_percent(case: Any, tmp_path: Path) -> None:
    _, stage, row, expected, bad, reason = case
    file = write(tmp_path / "data.jsonl", [row] * 98 + [bad] * 2)
    with pytest.raises(KTAMXConfigError, match="2 of 100 rows cannot be used, more than 1%") as caught:
        load_rows([str(file)], "train", stage)
    assert f"data.jsonl line 99: {reason}" in str(caught.value) or reason in str(caught.value)
    file = write(tmp_path / "data.jsonl", [row] * 99 + [bad])
    found = load_rows([str(file)], "train", stage)
    assert found.rows == [expected] * 99
    assert f"1 left out ({file} line 100: " in found.notes[0]
    assert reason in found.notes[0]


def test_lines_that_are_not_json_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n' * 150 + '{"text": \n')
    found = load_rows([str(file)], "train", "sft")
    assert len(found.rows) == 150
    assert "line 151: not JSON" in found.notes[0]
    file.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(KTAMXConfigError, match=r"1 of 2 rows cannot be used"):
        load_rows([str(file)], "train", "sft")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", "not JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.csv", "text,more\nonly one\n", "1 of 1 rows cannot be used"),
        ("a.jsonl", '{"question": "?"}\n', "no known format has the columns question"),
        (
            "a.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
            "data for stage: dpo, orpo or rm, and this is stage: sft",
        ),
        ("a.jsonl", "[1]\n", "not a row but list"),
    ],
)
def test_a_file_that_is_none_of_them_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(KTAMXConfigError, match=message):
        load_rows([str(tmp_path / name)], "train", "sft")


def test_a_folder_is_all_its_files_and_max_samples_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "one"}])
    write(tmp_path / "b.json", [{"text": "two"}, {"text": "three"}])
    (tmp_path / "notes.txt").write_text("not data")
    assert [row["text"] for row in load_rows([str(tmp_path)], "train", "sft").rows] == ["one", "two", "three"]
    assert len(load_rows([str(tmp_path)], "train", "sft", most=2).rows) == 2


def test_pairs_of_different_forms_are_refused_and_rows_of_answers_are_not(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", [{"text": "a"}]), write(tmp_path / "b.jsonl", [{"messages": [USER, FOUR]}])]
    assert len(load_rows([str(file) for file in files], "train", "sft").rows) == 2
    write(files[0], [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write(files[1], [{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}])
    with pytest.raises(KTAMXConfigError, match="different forms"):
        load_rows([str(file) for file in files], "train", "dpo")


@pytest.mark.parametrize(
    ("row", "stage", "its"),
    [
        ({"messages": [USER, FOUR], "label": True}, "sft", "kto"),
        ({"messages": [USER, FOUR], "kto_tag": "yes"}, "sft", "kto"),
        ({"instruction": "2+2?", "output": "4", "label": 0}, "sft", "kto"),
        ({"prompt": "a", "completion": "b", "label": "false"}, "dpo", "kto"),
        ({"prompt": "a", "completion": "b"}, "kto", "sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kto", "dpo, orpo or rm"),
        ({"prompt": [USER]}, "sft", "grpo"),
        ({"messages": [USER, FOUR]}, "pt", "sft"),
        ({"text": "a"}, "grpo", "pt or sft"),
        ({"text": "a"}, "rm", "pt or sft"),
    ],
)
def test_data_of_another_stage_are_not_taken(row: dict[str, Any], stage: str, its: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [row] * 2)
    with pytest.raises(KTAMXConfigError, match=f"which is data for stage: {its}, and this is stage: {stage}"):
        load_rows([str(file)], "train", stage)


def test_a_label_that_is_no_mark_is_no_matter_to_sft(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [{"messages": [USER, FOUR], "label": "arithmetic"}])
    found = load_rows([str(file)], "train", "sft")
    assert found.rows == [{"messages": [USER, FOUR]}]
    assert "nothing uses the columns label" in found.notes[1]


def test_llama_factorys_kto_tag(tmp_path: Path) -> None:
    columns = {"messages": "m", "kto_tag": "good"}
    info = {"mine": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns,
                     "tags": {"role_tag": "role", "content_tag": "content"}}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    write(tmp_path / "rows.json", [{"m": [USER, FIVE], "good": False}])
    (row,) = load_rows(["mine"], "train", "kto", dataset_dir=str(tmp_path)).rows
    assert row == {"prompt": [USER], "completion": [FIVE], "label": False}


@pytest.mark.parametrize(
    ("stage", "columns"),
    [("pt", {"text"}), ("kto", {"prompt", "completion", "label"}), ("rm", {"prompt", "chosen", "rejected"}),
     ("orpo", {"prompt", "chosen", "rejected"}), ("grpo", {"prompt", "answer"})],
)  # fmt: skip
def test_pydoc_is_for_every_stage(stage: str, columns: set[str]) -> None:
    one, other = load_rows(["builtin:pydoc"], "train", stage, most=2).rows
    assert set(one) == set(other) == columns
    assert stage != "kto" or one["label"] is not other["label"]


def test_pydoc_is_for_both_stages() -> None:
    (row,) = load_rows(["builtin:pydoc"], "train", "sft", most=1).rows
    assert [message["role"] for column in row.values() for message in column] == ["user", "assistant"]
    (pair,) = load_rows(["builtin:pydoc"], "train", "dpo", most=1).rows
    assert pair["chosen"] != pair["rejected"]
    (held_out,) = load_rows(["builtin:pydoc"], "eval", "sft", most=1).rows
    assert held_out != row


def test_rows_are_held_out() -> None:
    for size, count in ((0.3, 3), (4, 4)):
        train, held_out = split_off(10, size, seed=0)
        assert len(held_out) == count
        assert sorted(train + held_out) == list(range(10))
    with pytest.raises(KTAMXConfigError, match="leaves nothing"):
        split_off(10, 10, seed=0)
