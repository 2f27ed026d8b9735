"""Data files as they come: damaged, strange, of no kind at all. Each is a sentence with file and row, or rows."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer

from kt_hf.cli.failures import plain_failures
from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.settings import RunKeys
from kt_hf.train.data.reading import reading
from kt_hf.train.data.rows import Rows, load_rows
from kt_hf.train.data.sources import dataset_problem
from kt_hf.train.data.tokens import prepare
from tests.support.tiny import CHAT, tokenizer

MANY = ", ".join(f'"a{number}": 0' for number in range(100_000))
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]


def loaded(file: Path, stage: str = "sft") -> Rows:
    return load_rows([str(file)], "train", stage)


def refused(file: Path, content: str | bytes) -> str:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(KTAMXConfigError) as caught:
        loaded(file)
    assert file.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: not JSON: it is nested too deep"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "not JSON: it is nested too deep"),
        ("a.json", '{"a":' * 100_000, "nested too deep"),
        ("a.json", "3", "not a list of rows but int"),
        ("a.json", "null", "not a list of rows but NoneType"),
        ("a.json", '"text"', "not a list of rows but str"),
        ("a.json", "[1, 2]", "row 1: not a row but int"),
        ("a.json", '{"a": 1}', "no known format has the columns a"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "no known format has the columns test"),
        ("a.json", '[{"text": "a", "text": "b"}]', "the key 'text' is there twice"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "line 1: not JSON: the key 'text' is there twice"),
        ("a.jsonl", '{"text": Infinity}', "Infinity is not a number of JSON"),
        ("a.jsonl", '{"text": NaN}', "line 1: text is empty"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1: it has half a character"),
        ("a.jsonl", "\0\0\0", "line 1: not JSON"),
        ("a.jsonl", '{"text": "a\0b"}', "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 text (at byte 10)"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "not UTF-8 text"),
        ("a.json", "\ufeff", "has no rows"),
        ("a.json", "", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text\n", "has no rows"),
        ("a.csv", "text,text\na,b\n", "two columns have the same name"),
        ("a.csv", "text,id\na,1\nb\n", "line 3: it has 1 cells, the header 2"),
        ("a.csv", 'text\n"a\nb\n', "line 3: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
        ("a.tsv", "text\tid\na\n", "line 2: it has 1 cells"),
        ("a.parquet", b"", "not parquet, or damaged"),
        ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "not parquet, or damaged"),
        ("a.parquet", "text\na\n", "not parquet, or damaged"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_so(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in refused(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "a"}\n'),
        ("a.json", '\ufeff[{"text": "a"}, {"text": "a"}]'),
        ("a.json", '{"data": [{"text": "a"}, {"text": "a"}], "version": 1}'),
        ("a.json", '{"text": "a"}\n{"text": "a"}\n'),
        ("a.JSONL", '{"text": "a"}\r\n\r\n{"text": "a"}'),
        ("a.csv", "\ufefftext\na\n\na\n"),
        ("a.tsv", "text\tid\na\t1\na\t2\n"),
    ],
)
def test_marks_and_empty_lines_are_no_fault(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert loaded(tmp_path / name).rows == [{"text": "a"}] * 2


def test_one_row_in_a_json_file_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"messages": MESSAGES}, indent=2))
    assert loaded(tmp_path / "a.json").rows == [{"messages": MESSAGES}]


def test_long_cells_of_csv_are_read_and_the_limit_is_put_back(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "a" * 300_000 + "\n")
    assert len(loaded(tmp_path / "a.csv").rows[0]["text"]) == 300_000
    assert csv.field_size_limit() == limit
    refused(tmp_path / "a.csv", 'text\n"a\n')
    assert csv.field_size_limit() == limit


def test_a_folder_of_several_formats_is_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.json").write_text(json.dumps([{"messages": MESSAGES}]))
    (tmp_path / "c.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "d.json").write_text("")
    rows = loaded(tmp_path)
    assert [sorted(row) for row in rows.rows] == [["text"], ["messages"], ["messages"]]
    assert (
        "1 rows, format text in 1 files, and 1 rows, format messages in 1 files, and 1 rows, format alpaca"
        in rows.notes[0]
    )
    (tmp_path / "e.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(KTAMXConfigError, match=r"e\.jsonl\): no known format has the columns question"):
        loaded(tmp_path)
    (tmp_path / "e.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(
        KTAMXConfigError, match=r"e\.jsonl\) is preference pairs, which is data for stage: dpo, orpo or rm"
    ):
        loaded(tmp_path)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert dataset_problem("~/a.jsonl") is None
    assert len(load_rows(["~/a.jsonl"], "train", "sft").rows) == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("a\0.jsonl", "no such file"),
        ("a" * 5000 + ".jsonl", "cannot be looked at"),
        ("~nobody-of-that-name/a.jsonl", "cannot be looked at"),
        (3, "it must be text"),
        (None, "it must be text"),
        ({"a": 1}, "it must be text"),
        ("loop.jsonl", "no such file"),
        ("pipe.jsonl", "neither a file nor a folder"),
        ("empty", "holds no file that ends in"),
        ("owner/name/more", "neither a file nor a name on the hub"),
    ],
)
def test_a_name_that_names_nothing_is_told(
    spec: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.jsonl", "loop.jsonl")
    os.mkfifo("pipe.jsonl")
    Path("empty").mkdir()
    assert words in (dataset_problem(spec) or "")


def test_what_terminals_obey_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a\x1b.jsonl"
    file.write_text(json.dumps({"\x1b[2Jtext": "a", "messages": [{"role": "\x1b]0;title\x07", "content": "a"}]}))
    with pytest.raises(typer.Exit), plain_failures():
        loaded(file)
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert r"a\x1b.jsonl line 1" in error


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        (f'{{"text": "a", {MANY}, "a7": 0}}', "sft"),
        (f"{{{MANY}}}", "sft"),
        (json.dumps({"x" * 1_000_000: 1}), "sft"),
        (json.dumps({"messages": [{"role": "x" * 1_000_000}]}), "sft"),
        (json.dumps({"messages": MESSAGES * 2000}), "sft"),
        (json.dumps({"chosen": MESSAGES * 10_000, "rejected": MESSAGES * 10_000}), "dpo"),
    ],
    ids=["key twice", "many columns", "long column", "long role", "many turns", "many turns of pairs"],
)
def test_large_rows_are_read_in_time_or_refused_in_few_words(row: str, stage: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(row)
    start, words = time.process_time(), ""
    try:
        prepare(loaded(tmp_path / "a.jsonl", stage), reading(RunKeys(), {}, tokenizer(CHAT), 259), stage, "train")
    except KTAMXConfigError as error:
        words = str(error)
    assert len(words) < 2_000
    assert time.process_time() - start < 5


SEEDS: list[Any] = [
    {"text": "A story."},
    {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "add"}}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "chat_template_kwargs": {"a": 1}},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "five"}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
ODD = [
    None, True, -1, 0, 1e308, 10**30, "", " ", "\0", "\ud800", "é" * 50, [], {}, [[]], [None], {"": None}, [{}], "[",
    "{}", "x" * 200_000, [["a"]], {"role": "user"}, {"from": "gpt", "value": 3}, {"type": "image"}, -(2**70), "\x1b[3m",
]  # fmt: skip


MORE_KEYS = ("role", "content", "tools", "images", "train", "tool_calls", "system", "chat_template_kwargs", "")


def changed(value: Any, random_: random.Random, depth: int = 0) -> Any:
    """`value` with something in it replaced, removed, renamed, repeated or nested."""
    if random_.random() < 0.12 or depth > 6:
        return random_.choice(ODD)
    if isinstance(value, dict):
        result = {
            key: changed(inner, random_, depth + 1) if random_.random() < 0.5 else inner for key, inner in value.items()
        }
        if random_.random() < 0.1 and result:
            result.pop(random_.choice(list(result)))
        if random_.random() < 0.1:
            result[random_.choice(["role", "content", "tools", "images", "train", "tool_calls", "system", ""])] = (
                random_.choice(ODD)
            )
        return result
    if isinstance(value, list):
        result = [changed(inner, random_, depth + 1) if random_.random() < 0.5 else inner for inner in value]
        return result * random_.randint(0, 3) if random_.random() < 0.1 else result
    return value


def damaged(content: bytes, random_: random.Random) -> bytes:
    """`content` with some of its bytes changed, cut out or said twice."""
    data = bytearray(content)
    for _ in range(random_.choice((0, 0, 0, 1, 30))):
        at = random_.randrange(len(data) + 1) if data else 0
        kind = random_.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] = random_.randrange(256)
        elif kind == 1:
            del data[at : at + random_.randrange(1, 20)]
        elif kind == 2:
            data[at:at] = bytes(random_.randrange(256) for _ in range(random_.randrange(1, 9)))
        else:
            data[at:at] = data[at : at + random_.randrange(1, 200)]
    return bytes(data)


def strange_file(folder: Path, number: int) -> tuple[Path, str]:
    """(a file made from valid rows, changed as rows and as bytes by its number alone; mostly the right stage)."""
    random_ = random.Random(number)
    seed = random_.choice(SEEDS)
    share = random_.choice((0, 0.5, 1))
    rows = [changed(seed, random_) if random_.random() < share else seed for _ in range(random_.choice((0, 1, 3, 40)))]
    kind = random_.choice((".json", ".jsonl", ".jsonl", ".csv", ".tsv", ".parquet"))
    file = folder / f"{number}{kind}"
    if kind == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), file)
        except Exception:  # rows that parquet cannot hold: the valid ones
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([seed] * 3), file)
        file.write_bytes(damaged(file.read_bytes(), random_))
    elif kind in (".csv", ".tsv"):
        cells = [[json.dumps(value) for value in row.values()] for row in rows if isinstance(row, dict)]
        lines = [list(seed), *cells]
        separator = "," if kind == ".csv" else "\t"
        file.write_bytes(damaged("\n".join(separator.join(line) for line in lines).encode(), random_))
    else:
        text = json.dumps(rows) if kind == ".json" else "\n".join(json.dumps(row) for row in rows)
        file.write_bytes(damaged(text.encode(), random_))
    stage = "dpo" if ("chosen" in seed) == (random_.random() < 0.9) else "sft"
    return file, stage


def try_files(folder: Path, numbers: Iterator[int]) -> tuple[int, int]:
    """(files read, files refused); fails for whatever else a file does."""
    read = refusals = 0
    how = reading(RunKeys(), {"max_length": 200}, tokenizer(CHAT), 259)
    for number in numbers:
        file, stage = strange_file(folder, number)
        start = time.process_time()
        try:
            prepare(loaded(file, stage), how, stage, "train")
            read += 1
        except KTAMXConfigError as error:
            refusals += str(file) in str(error)
        except BaseException as error:
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 5, number
        file.unlink()
    return read, refusals


def test_strange_files_are_rows_or_sentences(tmp_path: Path) -> None:
    read, refusals = try_files(tmp_path, iter(range(100)))
    assert read + refusals == 100
    assert min(read, refusals) > 15


@pytest.mark.slow
def test_two_thousand_strange_files(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, refusals = try_files(tmp_path, iter(range(1000, 3000)))
    assert read + refusals == 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024**2  # KiB
