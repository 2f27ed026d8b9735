"""A tiny model in a folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny-model"))
