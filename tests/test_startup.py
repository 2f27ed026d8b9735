"""What `import kt_hf` and `kt-hf --help` do not import, and that PEFT is guarded whichever is imported first."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import get_peft_model
from typer.testing import CliRunner

import kt_hf
from kt_hf.cli import VERBS, app
from kt_hf.errors import KTAMXNotAvailableError
from kt_hf.peft_compat import patches
from kt_hf.peft_compat.patches import Patch
from tests.support.cases import TORCH_FP32
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, lora_config, patched_model

HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "numpy", "matplotlib"}


def loaded_after(code: str) -> set[str]:
    """The modules that a new process has imported once `code` has run."""
    code += "\nimport sys; print('\\nMODULES', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import kt_hf; dir(kt_hf)",
        "from kt_hf import KTConfig, KTAMXError; KTConfig(kt_lora_rank=4)",
        "import runpy, sys, contextlib; sys.argv = ['kt-hf', '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('kt_hf.cli', run_name='__main__')",
        "import runpy, sys, contextlib; sys.argv = ['kt-hf', 'train', '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('kt_hf.cli', run_name='__main__')",
    ],
    ids=["import", "config", "help", "help of a verb"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    modules = loaded_after(code)
    assert "kt_hf" in modules
    assert not HEAVY & modules


def test_help_shows_every_verb() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert "..." not in text.partition("Commands:")[2]  # a description that was cut


def test_public_names_are_known_before_they_are_used() -> None:
    assert set(kt_hf.__all__) <= set(dir(kt_hf))
    assert set(kt_hf._MODULES) <= set(kt_hf.__all__)
    assert kt_hf.adapters is importlib.import_module("kt_hf.adapters")
    with pytest.raises(AttributeError, match="no attribute 'aply_kt_moe'"):
        _ = kt_hf.aply_kt_moe


# The guards


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module of a function and a class, and patches of them; not imported yet."""
    (tmp_path / "guarded_library").mkdir()
    (tmp_path / "guarded_library" / "__init__.py").write_text("from .part import add\n")
    (tmp_path / "guarded_library" / "part.py").write_text(
        "def add(a, b):\n    return a + b\n\n"
        "class Thing:\n    @classmethod\n    def name(cls):\n        return cls.__name__\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patches, "_wrapper", {"x.add": lambda original, a, b: -original(a, b),
                                              "x.name": lambda original, cls: original(cls) * 2}.get)  # fmt: skip
    monkeypatch.setattr(patches, "version", lambda name: "7.0")
    own = (
        Patch("guarded_library.part", "add", "x.add", "sums", "1"),
        Patch("guarded_library.part.Thing", "name", "x.name", "names", "1"),
    )
    monkeypatch.setattr(patches, "PATCHES", own)
    yield "guarded_library.part"
    for name in ("guarded_library", "guarded_library.part"):
        sys.modules.pop(name, None)


def test_a_module_is_patched_when_it_is_imported(library: str) -> None:
    patches.install()
    part = importlib.import_module(library)
    assert part.add(1, 2) == -3
    assert sys.modules["guarded_library"].add(1, 2) == -3  # taken from it by another module since
    assert part.Thing.name() == "ThingThing"
    assert part.add.__wrapped__(1, 2) == 3
    part = importlib.reload(part)
    assert part.add(1, 2) == -3


def test_a_module_that_is_there_is_patched_at_once(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [f for f in sys.meta_path if not isinstance(f, patches._PatchAfterImport)])
    part = importlib.import_module(library)
    assert part.add(1, 2) == 3
    patches.install()
    patches.install()
    assert part.add(1, 2) == -3


def test_all_of_a_module_is_patched_or_nothing(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, gone = patches.PATCHES[0], Patch("guarded_library.part.Other", "subtract", "x.add", "sums", "1")
    monkeypatch.setattr(patches, "PATCHES", (there, gone))
    with pytest.raises(KTAMXNotAvailableError, match=r"Other\.subtract \(sums\), which guarded_library 7\.0 does"):
        importlib.import_module(library)
    monkeypatch.setattr(patches, "PATCHES", (there, dataclasses.replace(gone, optional=True)))
    assert importlib.import_module(library).add(1, 2) == -3


ORDERS = {
    "kt_hf first": "import kt_hf, peft, transformers",
    "peft first": "import peft, transformers, kt_hf",
    "a part of peft first": "from peft.utils import hotswap\nimport kt_hf.errors",
    "trainers first": "from transformers import Trainer, AutoModelForCausalLM\nfrom kt_hf import KTConfig",
    "all names first": "from kt_hf import *\nimport peft",
    "a package first": "import kt_hf.adapters",
    "peft inside of ours": "import kt_hf.peft_compat.saving",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model's configuration and an adapter of kt_hf for it."""
    folder = tmp_path_factory.mktemp("adapter")
    family = FAMILIES["qwen3_moe"]
    model = get_peft_model(patched_model(family, TORCH_FP32), lora_config(family))
    fill_lora(model, seed=1)
    model.save_pretrained(folder)
    model.get_base_model().config.save_pretrained(folder)
    return folder


def refused(order: str, adapter: Path) -> str:
    """The name of the error that a new process gets for the adapter on a model that is not patched."""
    code = (
        f"{order}\nimport sys\nfrom peft import PeftModel\nfrom transformers import AutoConfig, Qwen3MoeForCausalLM\n"
        f"model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained({str(adapter)!r}))\n"
        f"try:\n    PeftModel.from_pretrained(model, {str(adapter)!r})\n"
        "except Exception as error:\n    print('REFUSED', type(error).__name__, error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return out.rpartition("REFUSED ")[2]


def test_an_adapter_without_its_patch_is_refused(adapter: Path) -> None:
    """The order that most would write, where nothing of ours has been called."""
    assert refused(ORDERS["kt_hf first"], adapter).startswith("KTAMXConfigError The adapter holds LoRA of experts")


@pytest.mark.slow
@pytest.mark.parametrize("order", [name for name in ORDERS if name != "kt_hf first"])
def test_the_order_of_imports_makes_no_difference(adapter: Path, order: str) -> None:
    assert refused(ORDERS[order], adapter).startswith("KTAMXConfigError The adapter holds LoRA of experts")
