"""LLaMA-Factory's names of data sets: what its list says of them, or a sentence, and never a wait for the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.read import read_arguments
from kt_hf.train.data import sources
from kt_hf.train.data.rows import Rows, load_rows
from kt_hf.train.data.sources import dataset_problem
from tests.support.tiny import write_yaml
from tests.train.test_data import write

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "four"}
FIVE = {"role": "assistant", "content": "five"}
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you", "system_tag": "rule"}


def info(folder: Path, rows: list[Any], stage: str = "sft", **entry: Any) -> Rows:
    write(folder / "rows.json", rows)
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"} | entry, "other": {}}))
    return load_rows(["mine"], "train", stage, dataset_dir=str(folder))


@pytest.mark.parametrize(
    ("entry", "stage", "row", "expected"),
    [
        ({}, "sft", {"instruction": "2+", "input": "2?", "output": "four"},
         {"messages": [{"role": "user", "content": "2+\n2?"}, FOUR]}),
        ({"columns": {"prompt": "q", "response": "a"}}, "sft", {"q": "2+2?", "a": "four", "system": "not named"},
         {"messages": [USER, FOUR]}),
        ({"columns": {"prompt": "q", "query": "", "response": "a", "system": "s", "history": "h"}}, "sft",
         {"q": "2+2?", "a": "four", "s": "Be brief.", "h": [["a", "b"]]},
         {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b"}, USER, FOUR]}),
        ({"columns": {"prompt": "body"}}, "sft", {"body": "A story."}, {"text": "A story."}),
        ({"formatting": "sharegpt"}, "sft",
         {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]},
         {"messages": [USER, FOUR]}),
        ({"formatting": "sharegpt", "columns": {"messages": "turns", "tools": "t"}, "tags": TAGS}, "sft",
         {"turns": [{"who": "rule", "says": "Be brief."}, {"who": "me", "says": "2+2?"},
                    {"who": "you", "says": "four"}], "t": '[{"name": "add"}]'},
         {"messages": [{"role": "system", "content": "Be brief."}, USER, FOUR], "tools": [{"name": "add"}]}),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}, "dpo",
         {"q": "2+2?", "good": "four", "bad": "five"}, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
        ({"ranking": True, "formatting": "sharegpt", "tags": TAGS,
          "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"}}, "dpo",
         {"turns": [{"who": "me", "says": "2+2?"}], "good": {"who": "you", "says": "four"},
          "bad": {"who": "you", "says": "five"}},
         {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
    ],
)  # fmt: skip
def test_an_entry_says_what_the_columns_are(
    entry: dict[str, Any], stage: str, row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = info(tmp_path, [row, row], stage, **entry)
    assert found.rows == [expected] * 2
    if "system" in row:
        assert "nothing uses the columns system (not in columns)" in found.notes[1]


def test_an_entry_may_take_some_rows_or_a_folder(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 5
    assert len(info(tmp_path, rows, num_samples=3).rows) == 3
    (tmp_path / "many").mkdir()
    write(tmp_path / "many/a.jsonl", rows)
    write(tmp_path / "many/b.jsonl", rows)
    assert len(info(tmp_path, [], file_name="many").rows) == 10


def test_its_list_comes_before_files_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_hub", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "data").mkdir()
    (tmp_path / "identity").mkdir()
    write(tmp_path / "data/identity.json", [{"instruction": "Who?", "output": "I."}])
    listed = {"identity": {"file_name": "identity.json"}, "alpaca_en": {"file_name": "identity.json"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(listed))
    assert len(load_rows(["identity", "alpaca_en"], "train", "sft").rows) == 2  # `data` is its default
    # and a file may be named without its folder
    assert len(load_rows(["identity.json"], "train", "sft", dataset_dir="data").rows) == 1


@pytest.mark.parametrize("name", ["identity", "alpaca_en_demo", "mllm_demo"])
def test_a_name_of_no_list_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem = dataset_problem(name) or ""
    assert "there is no dataset_info.json in data (set dataset_dir)" in problem
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text("{}")
    assert "data/dataset_info.json does not name it" in (dataset_problem(name) or "")
    assert dataset_problem("alpaca_en") is None  # one of those that are on the hub


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "dataset_info.json cannot be read"),
        ("[" * 50_000, "nested too deep"),
        ("[]", "is not an object of data sets"),
        ('{"mine": 3}', "mine: it is not an object"),
        ('{"mine": {}}', "mine: no file_name"),
        ('{"mine": {"file_name": 3}}', "file_name must be text"),
        ('{"mine": {"file_name": "nothing.json"}}', "there is no file"),
        ('{"mine": {"file_name": "../rows.json"}}', "leads out of"),
        ('{"mine": {"file_name": "/etc/passwd"}}', "leads out of"),
        ('{"mine": {"file_name": "a\\u0000.json"}}', "leads out of"),
        ('{"mine": {"file_name": "rows.txt"}}', "the file must end in"),
        ('{"mine": {"script_url": "a"}}', "script_url cannot be read here"),
        ('{"mine": {"ms_hub_url": "a/b"}}', "ms_hub_url cannot be read here"),
        ('{"mine": {"file_name": "rows.json", "formatting": "chatml"}}', "formatting 'chatml' is not known"),
        ('{"mine": {"file_name": "rows.json", "num_samples": 0}}', "num_samples=0"),
        ('{"mine": {"file_name": "rows.json", "columns": [1]}}', "columns must be names"),
        ('{"mine": {"file_name": "rows.json", "tags": {"role_tag": 3}}}', "tags must be names"),
    ],
)
def test_a_list_that_is_not_right_is_told_with_its_entry(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    file = write_yaml(tmp_path / "run.yaml", model_name_or_path="builtin:smollm2-moe", dataset="mine",
                      dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))  # fmt: skip
    with pytest.raises(KTAMXConfigError, match="1 problem") as caught:
        read_arguments(file)
    assert words in str(caught.value)
    assert "line 2: dataset='mine': " in str(caught.value)


@pytest.mark.parametrize(
    ("offline", "words"), [(False, "there is no connection to it"), (True, "HF_HUB_OFFLINE is set")]
)
def test_the_hub_out_of_reach_is_a_sentence_at_once(
    offline: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits to try again"))
    with pytest.raises(KTAMXConfigError, match=f"owner/none cannot be had from the hub: {words}"):
        load_rows(["owner/none"], "train", "sft")
    with pytest.raises(KTAMXConfigError, match=r"mine: owner/none cannot be had from the hub.*Or give a file"):
        info(tmp_path, [], file_name=None, hf_hub_url="owner/none")
