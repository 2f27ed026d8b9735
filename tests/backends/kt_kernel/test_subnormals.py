"""Loading kt-kernel makes a process lose subnormal numbers; kt_hf gives them back. In processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = """
import threading, torch
def kept():
    return bool((torch.full((64,), 2.0**-127) * torch.ones(64)).all()) and bool(torch.tensor([2.0**-126]) * 0.5)
def kept_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(kept()))
    thread.start()
    thread.join()
    return found[0]
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SHOW + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_kt_kernel_alone_loses_them() -> None:
    """Pinned: should it keep them one day, `subnormals` can go."""
    pytest.importorskip("kt_kernel")
    assert run("print(kept()); import kt_kernel; print(kept(), kept_in_a_thread())") == ["True", "False", "False"]


def test_kt_hf_keeps_them() -> None:
    """After asking for the operators, and after starting their workers."""
    pytest.importorskip("kt_kernel")
    code = """
from kt_hf.backends.kt_kernel.installation import availability
from kt_hf.backends.kt_kernel.engine import Engine
from kt_hf.system.cpu import plan_threads
availability()
print(kept(), kept_in_a_thread())
engine = Engine.get(plan_threads(1, tp_enabled=False))
print(kept(), kept_in_a_thread())
"""
    assert run(code) == ["True"] * 4


def test_who_asked_for_zeros_keeps_them() -> None:
    pytest.importorskip("kt_kernel")
    code = """
torch.set_flush_denormal(True)
from kt_hf.backends.kt_kernel.installation import availability
availability()
print(kept())
"""
    assert run(code) == ["False"]
