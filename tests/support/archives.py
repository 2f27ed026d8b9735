"""Wheel and source archive of the working tree, as a release builds them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_CLONE = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone, in which git says what the files are")


def tracked() -> list[str]:
    """The repository's files as they are now: what git knows or would add, without what was deleted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def copy_tracked(target: Path) -> Path:
    """A folder with these files and nothing else: no build leftovers, as a fresh clone."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def build(source: Path, target: Path, *options: str) -> list[Path]:
    """What `python -m build` makes of a folder; by the setuptools of this environment, so without network."""
    if importlib.util.find_spec("packaging.licenses") is None:
        pytest.skip("setuptools reads a license expression by packaging 24.2 or later; kt_hf itself needs no such one")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)],
        cwd=target.parent, env=os.environ | {"SOURCE_DATE_EPOCH": "1764374400"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(target.iterdir())


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def sdist_files(sdist: Path) -> set[str]:
    """Names in a source archive, without its first folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
