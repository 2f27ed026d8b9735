"""What `--junitxml` says of a run besides its tests, for `scripts/families_table.py`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import pytest

LIBRARIES = ("transformers", "peft", "trl", "torch")


@pytest.fixture(scope="session", autouse=True)
def _versions(record_testsuite_property: Callable[[str, object], None]) -> None:
    for library in LIBRARIES:
        record_testsuite_property(library, version(library))
