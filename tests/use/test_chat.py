"""`kt-hf chat`: answers, files of them, commands, errors; and a pseudo-terminal that is typed on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from kt_hf import KTAMXError, KTConfig, apply_kt_moe
from kt_hf.cli import app
from kt_hf.system.row_linear import has_row_linear, row_linear
from kt_hf.use.chat import Chat
from kt_hf.use.generation import Answerer, Sampling, positions_of
from kt_hf.use.opening import Choice, Opened, check
from kt_hf.use.questions import Question, answer_file, read_questions
from tests.support.tiny import environment, save_model
from tests.use.conftest import Trained, save_adapter

QUESTION = "What is a list?"


@pytest.fixture(scope="module")
def opened(trained: Trained) -> Opened:
    return check(Choice(adapter=trained.adapter, device="cpu")).load()


def by_hand(trained: Trained, adapter: bool) -> str:
    """The answer as transformers, PEFT and the patch give it without kt_hf.use."""
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    model = apply_kt_moe(base, KTConfig(kt_backend="torch"), adapter=trained.adapter if adapter else None).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def typed(opened: Opened, lines: list[str], **settings: object) -> tuple[str, Chat]:
    """What a conversation shows that is typed so, and the conversation."""
    waiting = iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    shown = io.StringIO()
    chat = Chat(Answerer(opened, Sampling(max_new_tokens=6)), Console(file=shown, width=100), read, **settings)  # type: ignore[arg-type]
    chat.run()
    return shown.getvalue(), chat


def test_the_answers_are_those_of_base_and_adapter(trained: Trained, opened: Opened) -> None:
    answerer = Answerer(opened, Sampling(max_new_tokens=12))
    messages = [{"role": "user", "content": QUESTION}]
    for adapter in (True, False, True):
        expected = by_hand(trained, adapter)
        assert answerer.answer(messages, adapter) == expected
        assert "".join(answerer.stream(messages, adapter)).strip() == expected
    assert by_hand(trained, True) != by_hand(trained, False)


@pytest.mark.skipif(not has_row_linear(), reason="the CPU has no products of bf16")
def test_a_token_takes_the_short_way_through_the_models_own_layers(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    monkeypatch.setattr(
        "kt_hf.use.row_linears.row_linear", lambda x, *rest: rows.append(len(x)) or row_linear(x, *rest)
    )
    assert opened.model.dtype == torch.bfloat16
    Answerer(opened, Sampling(max_new_tokens=3)).answer([{"role": "user", "content": QUESTION}])
    assert rows
    assert len(rows) == 3 + (3 - 1) * 4 * opened.model.config.num_hidden_layers  # the head; attention after the prompt


def test_a_seed_repeats_what_is_drawn(opened: Opened) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    drawn = [
        Answerer(opened, Sampling(temperature=1.0, max_new_tokens=12, seed=seed)).answer(messages) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_settings_come_from_the_manifest(trained: Trained, opened: Opened) -> None:
    manifest = json.loads((trained.adapter / "kt_adapter_manifest.json").read_text())
    assert manifest["kt"] == {"kt_backend": "torch"}
    assert manifest["dtype"] == "bfloat16"
    assert opened.base == str(trained.base)
    assert opened.model.dtype == torch.bfloat16
    assert check(Choice(adapter=trained.adapter, device="cpu")).kt == KTConfig(kt_backend="torch", kt_lora_rank=4)


def test_commands(opened: Opened, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ["/help", "/nonsense", "/system Be brief.", QUESTION, "/base", "More?", "/both", "And?", f"/save {file}",
             f"/save {file}", "/think on", "/adapter", "/quit", "never read"]  # fmt: skip
    shown, chat = typed(opened, lines)
    assert "/reset " in shown
    assert "/nonsense is no command" in shown
    assert "The base model answers." in shown
    assert "base model" in shown
    assert "exists already" in shown
    assert "knows no thinking" in shown
    saved = json.loads(file.read_text())
    assert saved == chat.messages
    assert [m["content"] for m in saved if m["role"] != "assistant"] == ["Be brief.", QUESTION, "More?", "And?"]
    shown, chat = typed(opened, [QUESTION, "/reset"])
    assert chat.history == []


def test_another_adapter_is_taken_on_the_way(trained: Trained, tmp_path: Path) -> None:
    other = save_adapter(trained.base, tmp_path / "other", seed=1)
    opened = check(Choice(adapter=trained.adapter, device="cpu")).load()
    shown, chat = typed(opened, [f"/adapter {tmp_path}", f"/adapter {other}"])
    assert "no adapter there" in shown.replace("\n", " ")
    messages = [{"role": "user", "content": QUESTION}]
    alone = check(Choice(adapter=other, device="cpu")).load()
    expected = Answerer(alone, Sampling(max_new_tokens=6)).answer(messages)
    assert chat.answerer.answer(messages) == expected


def test_a_file_of_questions(trained: Trained, tmp_path: Path) -> None:
    rows = [{"prompt": QUESTION, "id": 7}, {"messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    command = ["chat", str(trained.adapter), "--input", str(tmp_path / "in.jsonl"), "--output", str(out),
               "--answer", "both", "--max-new-tokens", "12", "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers[:1]] == [7]
    assert answers[0]["answer"] == by_hand(trained, True)
    assert answers[0]["base_answer"] == by_hand(trained, False)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "assistant", "content": "x"}]}', '{"prompt": "a", "messages": []}'],
)  # fmt: skip
def test_a_bad_line_is_refused_before_anything_is_loaded(line: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, ["chat", "nowhere", "--input", str(tmp_path / "in.jsonl"), "--output", str(out)])
    assert done.exit_code == 2
    assert "line 2" in done.stderr
    assert not out.exists()


def test_lines_are_read_as_they_are_written(trained: Trained, tmp_path: Path) -> None:
    """With a byte order mark, line ends of Windows, and what Python takes for line ends within a text."""
    file = tmp_path / "in.jsonl"
    file.write_bytes("\ufeff".encode() + '{"prompt": "a\u2028b\x85c"}\r\n\r\n{"prompt": "d"}\r\n'.encode())
    assert [q.messages[0]["content"] for q in read_questions(file)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text (at byte 15)"),
        (b'{"prompt": "a\\ud800"}', "line 1: it holds half of a pair"),
        (b"\n \n", "has no lines"),
    ],
)
def test_a_file_that_is_no_text_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(KTAMXError, match=re.escape(says)):
        read_questions(file)


def test_more_than_the_model_has_positions_for(
    trained: Trained, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the weights are loaded; in a conversation the question is not kept."""
    long = "word " * 200
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", long)))
    for words in (["--prompt", long], ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]):
        with monkeypatch.context() as patched:
            patched.setattr("kt_hf.use.opening.load_model", lambda *_, **__: pytest.fail("loaded"))
            done = CliRunner().invoke(app, ["chat", str(trained.adapter), "--device", "cpu", *words])
        assert done.exit_code == 2, done.output
        where = "--prompt" if "--prompt" in words else "in.jsonl line 2"
        assert f"{where}: The conversation has 1,0" in done.stderr
        assert "positions for 512" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    shown, chat = typed(opened, [long, "Hi"])
    assert "positions for 512" in " ".join(shown.split())
    assert [message["content"] for message in chat.messages][:1] == ["Hi"]


def test_an_answer_ends_where_the_positions_do(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Answerer(opened, Sampling(max_new_tokens=50))
    inputs = answerer.inputs([{"role": "user", "content": QUESTION}])
    length = inputs["input_ids"].shape[1]
    monkeypatch.setattr(opened.model.config, "max_position_embeddings", length + 3)
    assert answerer._generate(inputs, adapter=True).shape[1] == length + 3


def test_positions_that_are_stretched_count() -> None:
    def positions(**rope: object) -> int | None:
        parameters = {"rope_theta": 1e6, "rope_type": "default", **rope}
        return positions_of(Qwen3MoeConfig(max_position_embeddings=512, rope_parameters=parameters))

    assert positions() == 512
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert positions(rope_type="linear", factor=2.0) == 1024
    assert positions_of(MambaConfig()) is None


def test_bytes_that_are_no_text(trained: Trained, opened: Opened) -> None:
    shown, chat = typed(opened, ["caf\udce9", "Hi"])
    assert "not UTF-8 text" in shown
    assert chat.messages[0]["content"] == "Hi"
    for words in (["--prompt", "caf\udce9"], ["--prompt", "Hi", "--system", "\udce9"]):
        done = CliRunner().invoke(app, ["chat", str(trained.adapter), *words])
        assert done.exit_code == 2, done.output
        assert f"{words[-2]} is not UTF-8 text" in done.stderr


def test_answers_that_cannot_be_written_are_printed(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [Question({"prompt": "Hi", "id": 7}, [{"role": "user", "content": "Hi"}], "line 1")]
    answerer = Answerer(opened, Sampling(max_new_tokens=2))
    with pytest.raises(OSError, match="gone"):  # a folder that went away meanwhile
        answer_file(answerer, questions, tmp_path / "gone" / "out.jsonl", "adapter", Console(quiet=True), False)
    assert json.loads(capsys.readouterr().out)["id"] == 7


def test_errors_say_what_to_do(trained: Trained, tmp_path: Path) -> None:
    def says(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["chat", *arguments, "--prompt", "Hi"])
        assert done.exit_code == 2, done.output
        return " ".join(done.stderr.split())

    assert "there is no such folder" in says(str(tmp_path / "none"))
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    shutil.copy(trained.adapter / "adapter_config.json", tmp_path / "run" / "checkpoint-3")
    assert "checkpoint-3 has one" in says(str(tmp_path / "run"))
    assert "--base NAME_OR_FOLDER" in says()
    assert "base model '/none/such'" in says(str(trained.adapter), "--base", "/none/such")
    assert "that is an adapter's folder" in says("--base", str(trained.adapter))
    assert "--temperature -1" in says(str(trained.adapter), "--temperature", "-1")
    assert "--answer all" in says(str(trained.adapter), "--answer", "all")
    bare = save_model(tmp_path / "bare", chat_template=None)
    assert "has no chat template" in says("--base", str(bare))
    with pytest.raises(KTAMXError):
        check(Choice(base=str(bare), device="cpu"))
    assert check(Choice(base=str(bare), device="cpu", template="alpaca")).tokenizer.chat_template


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "kt_hf", *arguments], env)
        self.shown = ""

    def wait_for(self, text: str, again: str = "") -> str:
        """Read until `text` has come, typing `again` once after half a minute of silence; what came before it."""
        silent = 0
        while text not in self.shown:
            if not select.select([self.descriptor], [], [], 30)[0]:
                silent += 1
                if silent == 10:
                    raise AssertionError(f"no {text!r} in five minutes, but {self.shown!r}")
                if silent == 1:
                    self.type(again)
                continue
            try:
                piece = os.read(self.descriptor, 4096)
            except OSError:  # the program has left
                piece = b""
            if not piece:
                raise AssertionError(f"no {text!r} in {self.shown!r}")
            self.shown += piece.decode("utf-8", errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def rest(self) -> str:
        """What it still shows until it has left."""
        with contextlib.suppress(OSError):
            while piece := os.read(self.descriptor, 4096):
                self.shown += piece.decode("utf-8", errors="replace")
        return self.shown

    def exit_code(self) -> int:
        """Wait for the program's end."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        """End the program, if it has not ended by itself."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code()
        os.close(self.descriptor)


@pytest.fixture
def terminal(trained: Trained, tmp_path: Path) -> Iterator[Terminal]:
    env = environment(tmp_path) | {"TERM": "dumb"}
    program = Terminal(["chat", str(trained.adapter), "--device", "cpu", "--max-new-tokens", "1000000"], env)
    with contextlib.closing(program):
        yield program


@pytest.mark.slow  # a program of its own, 12 s
def test_ctrl_c_stops_an_answer_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("Count to a million\n")
    terminal.wait_for("adapter:")  # it is about to answer, and would for hours
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    # At the prompt: Python's `input` loses one of thousands, between readline's prompt and its wait for a key.
    terminal.type("\x03")
    terminal.wait_for("/quit or Ctrl-D leaves", again="\x03")
    terminal.wait_for("> ")
    terminal.type("/base\n")
    terminal.wait_for("The base model answers.")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    shown = terminal.rest()
    assert terminal.exit_code() == 0, shown
