"""The versions kt_hf was tested with are its floors; an older package is refused at import, with the remedy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from .errors import KTAMXNotAvailableError

FLOORS = {"torch": "2.9", "transformers": "5.17", "peft": "0.21", "accelerate": "1.15", "safetensors": "0.6"}


def check_versions(floors: dict[str, str] = FLOORS) -> None:
    """Compare installed versions with the floors.

    Raises:
        KTAMXNotAvailableError: A package is missing or too old, with the command that mends it.
    """
    wrong = []
    for name, floor in floors.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append((name, floor, "not installed"))
            continue
        if Version(Version(installed).base_version) < Version(floor):
            wrong.append((name, floor, f"version {installed}"))
    if wrong:
        what = ", ".join(f"{name} {floor} or later ({found})" for name, floor, found in wrong)
        command = " ".join(f"'{name}>={floor}'" for name, floor, _ in wrong)
        raise KTAMXNotAvailableError(f"kt_hf needs {what}. Install with: pip install -U {command}")
