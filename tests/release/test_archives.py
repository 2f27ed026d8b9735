"""Wheel and source archive hold what they should and nothing else, and say what pyproject.toml says."""

from __future__ import annotations

import email
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_sdist_filename, parse_wheel_filename

from kt_hf import __version__
from tests.support.archives import NEEDS_CLONE, build, copy_tracked, sdist_files, tracked, wheel_files

pytestmark = NEEDS_CLONE

Archives = tuple[Path, Path, Path]
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """(source archive, the wheel built from it, the wheel built from the clone)."""
    folder = tmp_path_factory.mktemp("release")
    clone = copy_tracked(folder / "clone")
    (folder / "dist").mkdir()
    (folder / "direct").mkdir()
    sdist, wheel = sorted(build(clone, folder / "dist"), key=lambda path: path.suffix != ".gz")
    (direct,) = build(clone, folder / "direct", "--wheel")
    return sdist, wheel, direct


def test_the_names_have_the_version(archives: Archives) -> None:
    sdist, wheel, direct = archives
    assert wheel.name == direct.name == f"kt_hf-{__version__}-py3-none-any.whl"
    assert str(parse_sdist_filename(sdist.name)[1]) == str(parse_wheel_filename(wheel.name)[1]) == __version__


def test_the_source_archive_builds_the_same_wheel(archives: Archives) -> None:
    _, wheel, direct = archives
    assert wheel_files(wheel) == wheel_files(direct)
    assert wheel.read_bytes() == direct.read_bytes()


def test_the_wheel_is_the_package_and_nothing_else(archives: Archives) -> None:
    files = set(wheel_files(archives[1]))
    about = {name for name in files if name.startswith(f"kt_hf-{__version__}.dist-info/")}
    assert files - about == {name for name in tracked() if name.startswith("kt_hf/")}
    assert {name.partition("/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip
    assert {name.rpartition(".")[2] for name in files - about} == {"py", "typed", "json", "md"}


def test_the_source_archive_is_the_repository(archives: Archives) -> None:
    files = sdist_files(archives[0])
    assert {name for name in files if not name.startswith("kt_hf.egg-info/")} - MADE_BY_SETUPTOOLS == set(tracked())


def test_what_the_wheel_says_of_itself(archives: Archives) -> None:
    files = wheel_files(archives[1])
    about = f"kt_hf-{__version__}.dist-info"
    metadata = email.message_from_bytes(files[f"{about}/METADATA"])
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("kt-hf", __version__, ">=3.11")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"train", "vision", "demo", "docs", "dev"}
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    for extra in ("", "train", "demo"):
        names = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}
        assert {"torch", "transformers", "peft"} <= names
        assert ("trl" in names) == (extra == "train")  # demo asks for kt-hf[train]
    assert files[f"{about}/entry_points.txt"].decode() == "[console_scripts]\nkt-hf = kt_hf.__main__:main\n"
