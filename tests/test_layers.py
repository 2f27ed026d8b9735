"""The house: a module imports only from its own folder or from a row below, inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kt_hf

PACKAGE = Path(kt_hf.__file__).parent
# From the ground up. A row's rooms do not know each other. peft_compat has two: what is read of PEFT, which adapters/
# need, and what is replaced in it, which needs adapters/.
ROWS = (
    ("errors",),
    ("ranks", "gates"),
    ("_versions", "shapes", "config", "system", "peft_compat.internals"),
    ("forms",),
    ("discovery",),
    ("backends",),
    ("experts", "checkpoint"),
    ("quantized",),
    ("placement",),
    ("monitoring", "adapters"),
    ("peft_compat",),
    ("lora", "patch", "callback"),
    ("bitsandbytes_rest",),
    ("loading",),
    ("",),  # kt_hf/__init__.py: the public names
    ("builtin",),
    ("train",),
    ("tools",),
    ("use",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, row in enumerate(ROWS) for room in row}


def room_of(module: str) -> str:
    """The room of a dotted name within kt_hf: its first part, or the module where that has a row of its own."""
    return module if module in FLOOR else module.split(".")[0]


def imported(path: Path, source: str, package: Path = PACKAGE) -> set[str]:
    """Modules of kt_hf that a file imports, dotted, without `kt_hf.`."""
    where = ("kt_hf", *path.relative_to(package).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = where[: len(where) + 1 - node.level] if node.level else ()
            full = ".".join((*base, *([node.module] if node.module else [])))
            names |= {f"{full}.{alias.name}" if full == "kt_hf" else full for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("kt_hf").lstrip(".") for name in names if name.split(".")[0] == "kt_hf"}
    return {name if room_of(name) in FLOOR else "" for name in ours}  # `from kt_hf import KTConfig`: a public name


def upward(path: Path, source: str) -> list[str]:
    """The imports of a file that run up, or into a neighbour."""
    relative = path.relative_to(PACKAGE).with_suffix("")
    room = "" if relative.as_posix() == "__init__" else room_of(".".join(relative.parts))
    room = "__main__" if relative.name == "__main__" else room  # a program, which nobody imports
    return [
        f"{relative} -> {name or 'kt_hf'}"
        for name in sorted(imported(path, source))
        if room_of(name) != room and FLOOR[room_of(name)] >= FLOOR[room]
    ]


def test_every_import_goes_down_or_stays() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {
        room
        for file in files
        for room in [room_of(file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))]
    } - {"__init__"} == set(FLOOR) - {""}
    assert [arrow for file in files for arrow in upward(file, file.read_text())] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("backends/base.py", "from ..experts import KTExperts"),
        ("experts/layer.py", "def f():\n    from ..placement.packer import Packer"),
        ("experts/layer.py", "from ..checkpoint import ExpertCheckpoint"),
        ("train/run.py", "import kt_hf.cli"),
        ("config.py", "from . import KTExperts"),
        ("adapters/fit.py", "from ..peft_compat.checks import check_values"),
        ("peft_compat/internals.py", "from ..adapters.adapter import Adapter"),
    ],
)
def test_an_import_upwards_is_seen(file: str, line: str) -> None:
    assert len(upward(PACKAGE / file, line)) == 1
    assert upward(PACKAGE / file, "from .errors import KTAMXError\nimport torch") == [] or "/" in file


def peft_modules(source: str) -> set[str]:
    """Modules of PEFT that a file imports from."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in names if name.split(".")[0] == "peft"}


def test_peft_compat_alone_reads_pefts_internals() -> None:
    public = {"peft", "peft.tuners.lora", "peft.optimizers"}
    others = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "peft_compat"]
    assert {name for file in others for name in peft_modules(file.read_text())} == public
    assert peft_modules("def f():\n    from peft.utils.other import get_pattern_key") - public


def test_the_root_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
