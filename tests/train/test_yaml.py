"""YAML files and overrides: read by plain rules, bounded, and never an exception of another kind."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from kt_hf.train.config.read import read_arguments
from kt_hf.train.config.yaml_file import BadSettings, parse_settings, read_overrides

GOOD = "model_name_or_path: builtin:smollm2-moe\ndataset: builtin:pydoc\noutput_dir: out\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2025-02-30", "2025-02-30"), ("2025-02-03", "2025-02-03"), ("010", 10), ("1:30", "1:30"), ("0x10", "0x10"),
        ("1e-4", 1e-4), ("1E3", 1000.0), ("-5", -5), (".5", 0.5), ("1_000", 1000), ("yes", True), ("off", False),
        ("~", None), ("'010'", "010"), ("1.2.3", "1.2.3"), ("+7", 7),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    settings, problems = parse_settings(f"key: {text}", "f")
    assert problems == []
    assert settings["key"].value == value
    assert type(settings["key"].value) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("k=out #1", "out #1"), ("k=010", 10), ("k=a: b", "a: b"), ("k=*x", "*x"), ("k=!t", "!t"), ("k=", None),
        ("k=[1, a]", [1, "a"]), ("k={a: 1}", {"a": 1}), ("k='1'", "1"), ("k=1e-5", 1e-5), ("k=true", True),
        ("k=a=b", "a=b"), ("k= spaced ", "spaced"), ("k=2025-02-30", "2025-02-30"), ("k=%", "%"), ("k=- a", "- a"),
    ],
)  # fmt: skip
def test_overrides_are_taken_as_typed(override: str, value: Any) -> None:
    settings, problems = read_overrides({}, [override])
    assert problems == []
    assert settings["k"].value == value


def test_text_of_the_command_line_needs_no_quotes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    settings = read_arguments(file, ["run_name=007", "output_dir=1", "seed=010"])
    assert settings.trainer["run_name"] == "007"
    assert settings.trainer["output_dir"] == "1"
    assert settings.trainer["seed"] == 10
    assert settings.overrides == ("run_name=007", "output_dir=1", "seed=010")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: " + "9" * 5000, "line 4: seed: a number of 5000 digits"),
        ("run_name: \0", "is not YAML: .*character"),
        ('run_name: "a\\0b"', r"line 4: run_name='a\\x00b': it has a character that is no text"),
        ('run_name: "\\ud800"', "it has a character that is no text"),
        ('dataset: ["a\\0b.jsonl"]', "it has a character that is no text"),
        ("x: " + "[" * 5000, "brackets"),
        ("x: " + "[" * 400 + "]" * 400, "nested"),
        ("- " * 5000, "nested|is not YAML|not a list of settings"),
        (BOMB, "it has more than 10,000 values"),
        ("x: &x [*x]", "contains itself"),
        ("x: &x {<<: *x}", "contains itself"),
        ("run_name: !!timestamp 2025-02-30", "line 4: run_name: day is out of range"),
        ("seed: !!int a", "line 4: seed: invalid literal"),
        ("seed: !!python/object:os.system {}", "could not determine a constructor"),
        ("? [1, 2]\n: 3", r"the key \[1, 2\] is not a name"),
        ("'\\x1b[31m': 1", "is no known setting"),
        ("x" * 40_000, "is larger than"),
        ("num_train_epochs: .inf", "num_train_epochs=inf: it must be finite"),
        ("learning_rate: .nan", "it must be finite"),
        ("learning_rate: 1e999", "it must be finite"),
        ("max_steps: 99999999999", "it must be at most"),
        ("lora_target: [1]", "1 in it must be text"),
        ("report_to: [1]", "1 in it must be text"),
        ("output_dir: " + "x" * 5000, "cannot be looked at: File name too long"),
        ("model_name_or_path: ~/no/such/model", "there is no such folder"),
        ("model_name_or_path: ~nobody-here/model", "there is no such folder"),
    ],
    ids=range(26),
)  # fmt: skip
def test_what_cannot_be_read_is_told(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    key = text.split(":")[0]
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*lines, *["# "] * (3 - len(lines)), text]) + "\n")
    start = time.monotonic()
    with pytest.raises(BadSettings, match=message) as caught:
        read_arguments(file)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 3000
    assert all(character.isprintable() or character == "\n" for character in str(caught.value))


def test_a_file_of_thousands_of_wrong_keys_is_told_briefly(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"key{i}: {i}\n" for i in range(2000)))
    with pytest.raises(BadSettings, match=r"and 19[0-9][0-9] more") as caught:
        read_arguments(file)
    assert len(caught.value.problems) > 2000


def test_a_model_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    file = tmp_path / "run.yaml"
    file.write_text(GOOD.replace("builtin:smollm2-moe", "~/m"))
    assert read_arguments(file).run.model_name_or_path == str(tmp_path / "m")


PARTS = [
    "lora_rank", "seed", "kt_config", "kt_backend", "output_dir", "dataset", "stage", "lora_target", "report_to", "<<",
    "&a", "*a", "!!int", "!!timestamp", "!!binary", "!!set", "!!omap", "!!python/name:os.system", "!x", "[", "]", "{",
    "}", ",", ":", ": ", "- ", "? ", "|\n", ">\n", "\n", "\n  ", "\t", " ", "'", '"', "#", "%YAML 1.1\n", "---\n",
    "...\n", "~", "null", "yes", "0x1F", "0o17", "1:30", "1e999", ".inf", ".nan", "-1", "9" * 400, "2025-02-30", "é",
    "\u2028", "\x85", "\x1b[31m", "\0", "@", "`", "\\ud800", "\\x00", "sft", "dpo", "builtin:pydoc", "true",
]  # fmt: skip


def random_text(random_: random.Random) -> str:
    """A good file that is damaged, a shuffle of YAML's signs, or settings with odd values."""
    kind = random_.randrange(3)
    if kind == 0:
        text = list(GOOD + "lora_rank: 8\nlora_target: [q_proj, k_proj]\nkt_config: {kt_backend: torch}\n")
        for _ in range(random_.randrange(1, 8)):
            text[random_.randrange(len(text))] = random_.choice(PARTS)
        return "".join(text)
    if kind == 1:
        return "".join(random_.choice(PARTS) for _ in range(random_.randrange(1, 60)))
    return GOOD + "".join(
        f"{random_.choice(PARTS[:9])}: {''.join(random_.choices(PARTS, k=random_.randrange(1, 4)))}\n" for _ in range(4)
    )


def fuzz(count: int, seed: int, folder: Path) -> None:
    random_ = random.Random(seed)
    file = folder / "run.yaml"
    for number in range(count):
        text = random_text(random_)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        start = time.monotonic()
        try:
            read_arguments(file)
        except BadSettings as error:
            str(error).encode()
        except Exception as error:
            raise AssertionError(f"file {number} of seed {seed}: {type(error).__name__}: {error}\n{text!r}") from error
        assert time.monotonic() - start < 5, text
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_a_few_random_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(150, 1, tmp_path)


@pytest.mark.slow
def test_two_thousand_random_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(2_000, 2, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
