"""Packages that are missing or too old are refused at import, with the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kt_hf
from kt_hf import KTAMXNotAvailableError, _versions
from kt_hf._versions import CEILINGS, FLOORS, check_versions
from kt_hf.adapters import manifest
from kt_hf.cli import app

ROOT = Path(__file__).parent.parent


def test_this_installation_is_new_enough() -> None:
    check_versions()


def test_floors_are_those_of_the_package() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    written = {
        match[1]: match for text in dependencies if (match := re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?$", text))
    }
    assert {name: written[name][2] for name in FLOORS} == FLOORS
    assert {name: match[3] for name, match in written.items() if match[3]} == CEILINGS


@pytest.mark.parametrize("installed", ["2.9", "2.9.0", "2.9.1+cu128", "2.9.0a0+git1234", "2.10", "3.0"])
def test_new_enough(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(_versions, "version", lambda name: installed)
    check_versions({"torch": "2.9"}, {})


@pytest.mark.parametrize("installed", ["2.8.1", "2.8.1+cu128", "1.13", "2.8.99"])
def test_too_old(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(_versions, "version", lambda name: installed)
    with pytest.raises(KTAMXNotAvailableError) as error:
        check_versions({"torch": "2.9"}, {})
    assert f"torch 2.9 or later (version {installed})" in str(error.value)
    assert "pip install -U 'torch>=2.9'" in str(error.value)
    assert isinstance(error.value, ImportError)


@pytest.mark.parametrize("installed", ["0.23", "0.23.0.dev0", "0.24.1", "1.0"])
def test_too_new_is_a_warning_that_names_both_versions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: str
) -> None:
    monkeypatch.setattr(_versions, "version", lambda name: installed)
    check_versions({"peft": "0.21"}, {"peft": "0.23"})
    (message,) = caplog.messages
    assert f"peft below 0.23 only; version {installed} is installed" in message
    assert "pip install 'peft>=0.21,<0.23'" in message


@pytest.mark.parametrize("installed", ["0.21", "0.22.9", "0.22.0+cu1"])
def test_below_the_ceiling_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: str
) -> None:
    monkeypatch.setattr(_versions, "version", lambda name: installed)
    check_versions({"peft": "0.21"}, {"peft": "0.23"})
    assert not caplog.messages


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"one": "1.0", "two": "2.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(_versions, "version", version)
    with pytest.raises(KTAMXNotAvailableError) as error:
        check_versions({"one": "1.5", "two": "1.5", "three": "3.5"}, {})
    assert "one 1.5 or later (version 1.0), three 3.5 or later (not installed)" in str(error.value)
    assert str(error.value).endswith("pip install -U 'one>=1.5' 'three>=3.5'")


def test_checked_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLOORS, "peft", "99")
    with pytest.raises(KTAMXNotAvailableError, match="peft 99 or later"):
        importlib.reload(kt_hf)


def test_the_command_says_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FLOORS, "peft", "99")
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/kt-hf", "doctor"])
    with pytest.raises(SystemExit) as error:
        importlib.reload(kt_hf)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("kt-hf: kt_hf needs peft 99 or later (version ")


def test_public_names_are_there() -> None:
    assert all(hasattr(kt_hf, name) for name in kt_hf.__all__)


def test_the_version_stands_in_one_place() -> None:
    """A second number would stay behind at a release: pyproject.toml takes it from the code."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "kt_hf._versions.__version__"}}
    assert kt_hf.__version__ == _versions.__version__ == manifest._packages()["kt-hf"]
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{_versions.__version__}\n"
