"""The demo's questions and answers: the same every time, nothing leaks into the held-out part, imports do nothing."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from kt_hf.builtin import pydoc_rows as pydoc_data
from kt_hf.builtin.pydoc_rows import Item, collect, first_paragraph, import_modules, short_signature, split


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return collect(import_modules()[0])


def module_of(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    return module


def test_there_is_enough_to_train_on(items: list[Item]) -> None:
    train, held_out = split(items)
    assert len(train) > 1000
    assert 0.05 < len(held_out) / len(items) < 0.15
    assert len(train) + len(held_out) == len(items)


def test_nothing_leaks_into_the_held_out_part(items: list[Item]) -> None:
    train, held_out = split(items)
    last_parts = [{item.name.rpartition(".")[2].lower() for item in part} for part in (train, held_out)]
    assert not last_parts[0] & last_parts[1]
    paragraphs = [{re.sub(r"\W", "", item.paragraph.lower()) for item in part} for part in (train, held_out)]
    assert not paragraphs[0] & paragraphs[1]


def test_the_split_of_an_item_does_not_depend_on_the_others(items: list[Item]) -> None:
    held_out = {item.name for item in split(items)[1]}
    assert {item.name for item in split(items[::3])[1]} == held_out & {item.name for item in items[::3]}


def test_other_processes_make_the_same_items(items: list[Item], tmp_path: Path) -> None:
    code = (
        "import hashlib; from kt_hf.builtin.pydoc_rows import *\n"
        "print(hashlib.sha256(repr(split(collect(import_modules()[0]))).encode()).hexdigest())"
    )
    here = hashlib.sha256(repr(split(items)).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "77", "HOME": str(tmp_path), "COLUMNS": "33"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_answers_name_no_address_and_no_path(items: list[Item]) -> None:
    places = (str(Path.home()), os.getcwd(), sys.prefix)
    assert not [i for i in items if re.search(r" at 0x|0x[0-9a-f]{7,}", i.answer) or any(p in i.answer for p in places)]


def test_importing_prints_warns_and_writes_nothing(tmp_path: Path) -> None:
    # The module's own file is run by itself, so that the packages kt_hf imports do not blur what is seen.
    code = (
        "import runpy, sys; sys.dont_write_bytecode = True\n"
        f"data = runpy.run_path({pydoc_data.__file__!r}, run_name='data')\n"
        "assert data['import_modules']()[0]\n"
        "import threading; assert threading.active_count() == 1\n"
        "bad = {'this', 'antigravity', 'tkinter', '_tkinter', 'idlelib', 'turtle'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    code = code.replace("data = runpy", "sys.modules['data'] = sys.modules[__name__]; data = runpy")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_missing_module_is_reported_and_a_broken_one_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, missing = import_modules(["json", "no_such_module_of_python"])
    assert [module.__name__ for module in modules] == ["json"]
    assert missing == ["no_such_module_of_python"]
    (tmp_path / "broken_for_this_test.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        import_modules(["broken_for_this_test"])


def test_what_is_collected() -> None:
    module = module_of(
        "shed",
        '''
import textwrap
from textwrap import dedent
def plough(field: "str", *, depth: int = 3) -> "str":
    """Turn the earth of a field.

    A second paragraph.
    """
def again(field):
    """Turn the earth   of a FIELD."""
def _private(): "Not to be seen by anybody at all."
def undocumented(): pass
def address(tool=object()): "Has a default value that shows its address."
second_name = plough
class Barn:
    """Keep hay, and now and then a cow."""
    def fill(self, hay): "Put hay into the barn by the door."
    def _lock(self): "Not to be seen by anybody at all, either."
''',
    )
    items = {item.name: item for item in collect([module])}
    # `again` comes first by name, so it is the one of the two equal paragraphs that stays.
    assert set(items) == {"shed.again", "shed.Barn", "shed.Barn.fill"}
    assert items["shed.Barn.fill"].answer == "`shed.Barn.fill(hay)`: Put hay into the barn by the door."
    del module.again
    items = {item.name: item for item in collect([module])}
    assert items["shed.plough"].answer == "`shed.plough(field, *, depth=3)`: Turn the earth of a field."


def test_well_known_names_read_as_people_write_them(items: list[Item]) -> None:
    names = {item.name for item in items}
    assert {"os.path.join", "os.listdir", "heapq.heappush", "textwrap.dedent", "sorted", "str.strip"} <= names
    assert not [name for name in names if name.startswith(("builtins.", "posix", "_"))]


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Give back\n    what was   lent.\n\n    More.", "Give back what was lent."),
        (None, None),
        ("Too short.", None),
        ("No full stop at the end of this sentence", None),
        ("lower(case) -> signature first, then what it does.", None),
        ("Long " + "word " * 60 + "end.", None),
    ],
)
def test_first_paragraph(doc: str | None, expected: str | None) -> None:
    assert first_paragraph(doc) == expected


def test_signatures_that_vary_or_are_unknown_are_left_out() -> None:
    assert short_signature(lambda a, b=2: 0, drop_self=False) == "(a, b=2)"
    assert short_signature(lambda a, b={1, 2}: 0, drop_self=False) is None
    assert short_signature(lambda out=sys.stdout: 0, drop_self=False) is None
    assert short_signature(dict.update, drop_self=True) is None


def test_a_row_asks_in_the_prompt_and_answers_in_the_completion() -> None:
    row = Item("shed.rake", "(leaves)", "Gather the leaves.").row()
    assert row == {
        "prompt": [{"role": "user", "content": "What does Python's `shed.rake` do?"}],
        "completion": [{"role": "assistant", "content": "`shed.rake(leaves)`: Gather the leaves."}],
    }
