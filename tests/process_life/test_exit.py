"""A process with a patched model ends as it would without: at once, with its own exit code and its own words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cases import KERNEL_MARKS
from tests.support.exit_scenarios import SCENARIOS

pytestmark = [*KERNEL_MARKS, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

# Name -> exit code, standard output after "trained\n", pattern of standard error; "", "0" and "" unless given.
EXPECTED: dict[str, tuple[int, str, str]] = {
    "exception": (1, "", r"Traceback [^\0]*ValueError: on purpose\n"),
    "sys.exit": (3, "", ""),
    "sys.exit with words": (1, "", "told\n"),
    "model deleted": (0, "deleted\n", ""),
    "interrupted": (-2, "", r"Traceback [^\0]*KeyboardInterrupt\n"),
    "printed at exit": (0, "logged\nlate\nto the old\nraw\n", ""),
    "printed by a finalizer": (0, "finalizer True\n", ""),
    "model used at exit": (0, "loss True\n", ""),
    "without a newline": (0, "half", ""),
    "a thread that ends later": (0, "thread\n", ""),
    "a fork that ends": (0, "child\nwaited 0\n", ""),
    "a fork that deletes": (0, "waited 0\n", ""),
    "a fork that calls": (0, "KTAMXForwardError\nwaited 0\n", ""),
    "a fork that patches": (0, "KTAMXNotAvailableError\nwaited 0\n", ""),
    "a fork while a thread computes": (0, "KTAMXForwardError\nwaited 0\n", ""),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what all scenarios printed and how they ended; one import for all of them."""
    folder = tmp_path_factory.mktemp("ended")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment["PYTHONUNBUFFERED"] = "1"  # a fork inherits no text that is not yet written
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.exit_scenarios", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    # PEFT imports bitsandbytes where it is installed, which on a CPU with AVX512-BF16 advises on its own operators.
    own = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert (done.returncode, done.stdout, own) == (0, "", [])
    return folder


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=list(SCENARIOS))
def test_end(ended: Path, number: int) -> None:
    code, out, err = EXPECTED.get(list(SCENARIOS)[number], (0, "", ""))
    assert (ended / f"{number}.rc").read_text() == str(code)
    assert (ended / f"{number}.out").read_text() == f"trained\n{out}"
    assert re.fullmatch(err, (ended / f"{number}.err").read_text())
