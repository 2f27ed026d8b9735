"""`kt-hf doctor`: facts, self-tests that can fail, remedies, and the exit code."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kt_hf.backends import OPERATORS, TorchBackend, kernel_availability
from kt_hf.backends.kt_kernel import installation
from kt_hf.cli import app
from kt_hf.system import child
from kt_hf.tools import doctor, selftest
from tests.support.cases import KERNEL_MARKS
from tests.support.machine import features


def invoke(*options: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *options])


def found(name: str, value: str = "fine", ok: bool | None = True, fix: str = "") -> doctor.Finding:
    return doctor.Finding("group", name, value, ok, fix)


def test_it_tells_what_this_machine_is() -> None:
    result = invoke("--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == (0 if answer["ok"] else 1)
    names = {(finding["group"], finding["name"]) for finding in answer["findings"]}
    wanted = {"AMX", "AVX512-BF16", "cores", "NUMA", "plan"}
    assert {("CPU", name) for name in wanted} <= names
    assert {("versions", name) for name in ("torch", "transformers", "peft", "trl", "kt-kernel")} <= names
    assert ("self-test", "torch") in names
    tests = [finding for finding in answer["findings"] if finding["group"] == "self-test"]
    operators = {name for name in OPERATORS if kernel_availability(name).ok}
    assert {"AMXBF16", "AMXInt8", "AMXInt4"} <= operators or not kernel_availability().ok
    assert {finding["name"] for finding in tests} == {"torch"} | operators
    assert all(finding["ok"] for finding in tests), tests


def test_what_is_wrong_comes_with_a_remedy_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [found("a"), found("b", "broken", False, "mend [it]")])
    result = invoke()
    assert result.exit_code == 1
    assert "group, b: mend [it]" in result.stdout
    assert result.stdout.rstrip().endswith("```\ngroup/a: fine\ngroup/b: broken\n```")


def test_all_well_is_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [found("a"), found("b", ok=None, fix="an advice")])
    assert invoke().exit_code == 0


def test_old_packages_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: {"trl": "0.9", "torch": None}.get(name, "99.0"))
    wrong = {finding.name: finding for finding in doctor._versions() if finding.ok is False}
    assert set(wrong) == {"trl", "torch", "kt-kernel"}
    assert wrong["trl"].fix == "pip install -U 'kt-hf[train]'"
    assert wrong["torch"].value == "not installed (at least 2.9)"


@pytest.mark.parametrize(
    ("python", "ok", "fix"),
    [((3, 12, 9), False, "pip install kt-kernel==0.7.2"), ((3, 13, 0), None, "use Python 3.11 or 3.12")],
)
def test_no_kt_kernel_is_wrong_only_where_it_has_wheels(
    python: tuple[int, ...], ok: bool | None, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "sys", SimpleNamespace(version_info=python, platform="linux"))
    monkeypatch.setattr(installation, "platform", SimpleNamespace(machine=lambda: "x86_64"))
    monkeypatch.setattr("kt_hf.system.cpu.cpu_features", lambda: features(avx512_bf16=True))
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    reason = installation.availability.__wrapped__()
    monkeypatch.setattr("kt_hf.backends.kernel_availability", lambda *_: reason)
    finding = next(doctor._kernel())
    assert (finding.ok, fix in finding.fix) == (ok, True)
    assert ("pip install" in finding.value) == (ok is False)


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=KERNEL_MARKS) for name in ("AMXBF16", "AMXInt8", "AMXInt4"))]
)
def test_a_backend_that_computes_right_passes(backend: str) -> None:
    result = selftest.in_new_process(backend)
    assert result.ok, result
    assert result.output_error < selftest.TOLERANCE[backend]
    assert result.gradient_error > 0


def test_wrong_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchBackend.backward

    def wrong(self: TorchBackend, *arguments: Any) -> Any:
        gradients = right(self, *arguments)
        gradients.lora[3].mul_(1.01)
        return gradients

    monkeypatch.setattr(TorchBackend, "backward", wrong)
    result = selftest.run("torch")
    assert not result.ok
    assert "wrong numbers" in str(result.problem)
    monkeypatch.setattr(TorchBackend, "backward", right)
    forward = TorchBackend.forward
    monkeypatch.setattr(
        TorchBackend,
        "forward",
        lambda self, *a, **k: (forward(self, *a, **k)[0] * torch.nan, forward(self, *a, **k)[1]),
    )
    assert not selftest.run("torch").ok


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by signal 4"),
        ("raise SystemExit('out of order')", "failed: out of order"),
        ("print('no JSON')", "failed: no message"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_crash_is_a_finding(code: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child.subprocess.run
    monkeypatch.setattr(child.subprocess, "run", lambda command, **k: run([command[0], "-c", code], **k))
    assert problem in str(selftest.in_new_process("torch", seconds=1 if "sleep" in code else 60).problem)
