"""Models in folders, made once: a tiny random one, and two layers of the demo's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kt_hf.builtin import smollm2_moe as upcycle
from tests.support import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec(upcycle.GGUF_PACKAGE) is None:
        pytest.skip(f"needs {upcycle.INSTALL_HINT}")
    folder = tmp_path_factory.mktemp("demo-model")
    model, tokenizer = upcycle.upcycle(num_layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
