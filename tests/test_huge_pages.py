"""Pages of 2 MB are asked for before PyTorch is loaded, and not behind the user's back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kt_hf._huge_pages import VARIABLE, huge_pages

_IN_HUGE_PAGES = """
import {first}
import torch
values = torch.ones(64 * 2**20, dtype=torch.uint8)
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")) >> 10)
"""


@pytest.mark.skipif(huge_pages() != "madvise", reason="the system gives huge pages to all, or to nobody")
@pytest.mark.parametrize(
    ("first", "set_to", "wanted"), [("kt_hf", None, True), ("kt_hf", "0", False), ("torch, kt_hf", None, False)]
)
def test_large_tensors_are_in_huge_pages(first: str, set_to: str | None, wanted: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "GLIBC_TUNABLES")}
    environment |= {VARIABLE: set_to} if set_to else {}
    command = [sys.executable, "-W", "ignore", "-c", _IN_HUGE_PAGES.format(first=first)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (int(done.stdout) > 32) == wanted


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_mode(tmp_path: Path, text: str | None, mode: str) -> None:
    file = tmp_path / "enabled"
    if text is not None:
        file.write_text(text)
    assert huge_pages(file) == mode
