"""Mutation testing: break one thing in the code at a time, and see whether the tests of its folder notice.

    PYTHONPATH=. python tests/mutate.py --count 40 --seed 0 --jobs 2 --skip 'kt_hf/backends/gpu/*' > table.md

Candidates are all places in the functions of FOLDERS where one of the operators below applies; the seed draws as many
from each folder, all operators in turn, and two from one function only when no other is left. Each is applied to a copy
of the tree in a temporary folder and given to the folder's fast tests until one fails. `--only` repeats mutants by
their "file:line".

Code this machine cannot run belongs into `--skip`: nothing could fail there. The table names what was
skipped. Branches for a CUDA tensor are left out always.

Each folder's tests run first on the tree as it is: one that fails so would kill every mutant, and nothing is measured
(`--broken` names tests to leave out). With the mutants ten minutes to an hour. Tests run in forks of a process that has
imported the libraries already.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("experts", "backends", "adapters")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "hypothesis", "cpuinfo", "typer",
             "transformers.models.mixtral.modeling_mixtral", "transformers.models.qwen3_moe.modeling_qwen3_moe",
             "transformers.models.deepseek_v3.modeling_deepseek_v3")  # fmt: skip
# Test files of a folder that run first, by how a module's name begins; and those that run last, for they are long.
FIRST = {
    "adapter": "test_corruption", "packed": "test_packed", "buffer_pool": "test_buffer_pool",
    "build": "test_three_tiers", "config_file": "test_settings", "convert": "test_convert",
    "embeddings": "test_other_tensors", "finite_checks": "test_tiered", "fit": "test_refused_in_time",
    "function": "test_gradients", "lora_tensors": "test_gradients", "manifest": "test_corruption",
    "merge": "test_merge",
    "other_tensors": "test_other_tensors", "pe": "test_convert", "projections": "test_fresh_lora",
    "registry": "test_registry", "runs": "test_tiered", "runner": "test_tickets", "tickets": "test_tickets",
    "tiered": "test_tiered",
    "torch_loop": "test_row_filling", "verify": "test_corruption",
}  # fmt: skip
LAST = ("gpu/", "test_kill", "test_fuzz", "test_activation_memory", "test_resume", "test_8_bits", "test_checkpointing")
SWAPPED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
TWINS = {"gate": "up", "up": "gate", "gate_proj": "up_proj", "up_proj": "gate_proj", "a": "b", "b": "a"}
REMOVED = ("detach", "to", "contiguous", "clone", "float", "masked_fill")


@dataclass(frozen=True)
class Mutant:
    """Bytes `start` to `end` of a file become `new`."""

    file: str
    line: int
    function: str
    kind: str
    start: int
    end: int
    old: str
    new: str

    @property
    def what(self) -> str:
        old, new = (re.sub(r"\s+", " ", text) for text in (self.old, self.new))
        return f"{self.kind}: `{old if len(old) < 90 else old[:87] + '...'}` -> `{new if len(new) < 90 else '...'}`"


def candidates(file: str) -> list[Mutant]:
    """All mutants of the functions of a file."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutants = []
    for function, node in _nodes(ast.parse(source), ""):
        for kind, new in _changes(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old = source[begin:end].decode()
            text = (
                new
                if isinstance(node, ast.stmt) or (node.end_lineno == node.lineno and new.isidentifier())
                else f"({new})"
            )
            mutants.append(Mutant(file, node.lineno, function, kind, begin, end, old, text))
    return mutants


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node inside a function that may be changed, with the function's name."""
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef):
            inside = f"{function}.{child.name}"
        elif isinstance(child, (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.arguments)) or (
            isinstance(child, ast.Expr) and re.match(r"logger\.(debug|info)|super\(|'", ast.unparse(child))
        ):
            continue  # not what a function computes
        if isinstance(child, ast.If) and re.search(r"cuda|on_gpu|triton", ast.unparse(child.test)):
            for other in child.orelse:
                yield from _nodes(ast.Module([other], []), inside)
            continue
        if function and not (isinstance(node, ast.FunctionDef) and child not in node.body):
            yield inside, child
        if isinstance(child, ast.Raise) or (isinstance(node, ast.FunctionDef) and child not in node.body):
            continue  # a message, or a decorator or annotation
        yield from _nodes(child, inside)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What a node can be changed to: (operator, new source)."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            yield "comparison", ast.unparse(ast.Compare(node.left, [SWAPPED[type(op)]()], node.comparators))
        case ast.BoolOp():
            yield "and/or", ast.unparse(ast.BoolOp(SWAPPED[type(node.op)](), node.values))
        case ast.BinOp() if type(node.op) in SWAPPED and not re.search("['\"]", ast.unparse(node)):
            yield "arithmetic", ast.unparse(ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign", ast.unparse(node.operand)
        case ast.Expr(value=ast.Call()):
            yield "lost call", "pass"
        case ast.Raise():
            yield "lost check", "pass"
        case ast.Constant(value=bool()):
            yield "constant", str(not node.value)
        case ast.Constant(value=0 | 1) if isinstance(node.value, int):
            yield "constant", str(1 - node.value)
        case ast.Constant(value=str()) if node.value in TWINS:
            yield "projection", repr(TWINS[node.value])
        case ast.Attribute(attr="a" | "b"):
            yield "projection", ast.unparse(ast.Attribute(node.value, TWINS[node.attr]))
        case ast.IfExp():
            yield "condition", ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))
        case ast.Call(func=ast.Attribute(attr=name)) if name in REMOVED:
            yield "lost conversion", ast.unparse(node.func.value)
    if isinstance(node, ast.Call):
        for i, (left, right) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if type(left) is type(right) and isinstance(left, (ast.Name, ast.Attribute)):
                args = [*node.args[:i], right, left, *node.args[i + 2 :]]
                yield "arguments", ast.unparse(ast.Call(node.func, args, node.keywords))


def draw(count: int, seed: int, skip: list[str]) -> list[Mutant]:
    """`count` mutants, as many from each folder and, in it, from each operator; of different functions if possible."""
    chance, drawn = random.Random(seed), []
    for place, folder in enumerate(FOLDERS):
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kt_hf" / folder).rglob("*.py"))
        kinds: dict[str, list[Mutant]] = defaultdict(list)
        for file in files:
            if not any(fnmatch.fnmatch(file, pattern) for pattern in skip):
                for mutant in candidates(file):
                    kinds[mutant.kind].append(mutant)
        wanted, used = len(drawn) + count // len(FOLDERS) + (place < count % len(FOLDERS)), set()
        while len(drawn) < wanted and any(kinds.values()):
            for kind in sorted(kinds):
                fresh = [m for m in kinds[kind] if (m.file, m.function) not in used] or kinds[kind]
                if fresh and len(drawn) < wanted:
                    mutant = chance.choice(fresh)
                    kinds[kind].remove(mutant)
                    used.add((mutant.file, mutant.function))
                    drawn.append(mutant)
    return drawn


class FirstFailure:
    """A pytest plugin that keeps the name of the first test that failed, and orders the files."""

    def __init__(self, module: str, broken: set[str]) -> None:
        self.broken = broken
        self.first = next((file for name, file in FIRST.items() if module.startswith(name)), "-")
        self.name = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.broken]
        items.sort(key=lambda item: (self.first not in item.nodeid, any(part in item.nodeid for part in LAST)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"NOT RUN: {report.nodeid} cannot be imported"


def control(file: str) -> Mutant:
    """A mutant of a file that changes nothing."""
    return Mutant(file, 0, "", "control", 0, 0, "", "")


def run(mutant: Mutant, limit: float, broken: set[str], tests: list[str]) -> str:
    """The test that fails with the mutant, "" if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder) / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        source = (copy / mutant.file).read_bytes()
        (copy / mutant.file).write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_tests, args=(mutant, copy, broken, tests, send))
        process.start()
        send.close()
        try:
            return receive.recv() if receive.poll(limit) else f"no answer in {limit:.0f} s"
        except EOFError:
            return "the process died"
        finally:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _tests(mutant: Mutant, copy: Path, broken: set[str], tests: list[str], answer: Connection) -> None:
    os.setsid()
    os.chdir(copy)
    os.environ["PYTHONPATH"], sys.dont_write_bytecode = str(copy), True
    sys.path.insert(0, str(copy))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    folder = mutant.file.split("/")[1]
    result = FirstFailure(Path(mutant.file).stem, broken)
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=200", *(tests or [f"tests/{folder}"])]
    code = pytest.main(options, plugins=[result])
    answer.send(result.name or ("" if code == 0 else f"NOT RUN: pytest ended with {code}"))
    answer.close()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a mutant")
    parser.add_argument("--skip", nargs="*", default=[], help="files that are left out, as globs")
    parser.add_argument("--only", nargs="*", default=[], help="of the drawn mutants these alone, by file:line")
    parser.add_argument("--tests", nargs="*", default=[], help="instead of the folder's, as pytest takes them")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--broken", type=Path, help="a file of the tests that fail here without a mutant, an id a line")
    given = parser.parse_args()
    broken = set(given.broken.read_text().splitlines()) if given.broken else set()
    mutants = [
        m for m in draw(given.count, given.seed, given.skip) if not given.only or f"{m.file}:{m.line}" in given.only
    ]
    print(f"Seed {given.seed}, {len(mutants)} mutants. Left out: {', '.join(given.skip) or 'nothing'}.\n")
    print("| where | what | killed by |\n|---|---|---|", flush=True)
    if given.list:
        for mutant in mutants:
            print(f"| {mutant.file}:{mutant.line} | {mutant.what} | |")
        return
    for name in LIBRARIES:
        importlib.import_module(name)

    for folder, file in {m.file.split("/")[1]: m.file for m in mutants}.items():
        killer = run(control(file), given.limit, broken, given.tests)
        if killer:
            parser.exit(1, f"The tests of {folder} do not pass without a mutant, so nothing is measured: {killer}\n")

    def row(mutant: Mutant) -> bool:
        killer = run(mutant, given.limit, broken, given.tests)
        print(f"| {mutant.file}:{mutant.line} | {mutant.what} | {killer or '**SURVIVED**'} |", flush=True)
        return not killer or killer.startswith(("no answer", "NOT RUN"))

    with ThreadPoolExecutor(given.jobs) as pool:
        survivors = sum(pool.map(row, mutants))
    print(f"\n{len(mutants) - survivors} killed, {survivors} survived or were not run to the end.")


if __name__ == "__main__":
    main()
