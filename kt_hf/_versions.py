"""The version of kt_hf, and those of other packages: below a floor it refuses at import, from a ceiling on it warns."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from .errors import KTAMXNotAvailableError

__version__ = "0.2.0"
"""The one place where it stands: pyproject.toml, manifests and the command line read it here."""

FLOORS = {"torch": "2.9", "transformers": "5.17", "peft": "0.21", "accelerate": "1.15", "safetensors": "0.8"}
CEILINGS = {"transformers": "6", "peft": "0.23"}
"""The first versions whose private functions nobody has compared with those that kt_hf replaces."""

logger = logging.getLogger(__name__)


def check_versions(floors: dict[str, str] = FLOORS, ceilings: dict[str, str] = CEILINGS) -> None:
    """Compare installed versions with the floors, and with the ceilings, which only warn.

    Args:
        floors: Package name -> oldest version that works.
        ceilings: Package name -> first version that was not tested. Pip refuses it already; who installs it all the
            same may know better, so it is no error here.

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
    for name, ceiling in ceilings.items():
        installed = version(name)
        if Version(Version(installed).base_version) >= Version(ceiling):
            logger.warning(
                "kt_hf was tested with %s below %s only; version %s is installed. It replaces private functions of %s, "
                "so if something fails, install an older one: pip install '%s'",
                name, ceiling, installed, name, requirement(name),
            )  # fmt: skip


def requirement(name: str) -> str:
    """The versions of a package that kt_hf was tested with, as pip takes them: `peft>=0.21,<0.23`."""
    ceiling = CEILINGS.get(name)
    return f"{name}>={FLOORS[name]}" + (f",<{ceiling}" if ceiling else "")
