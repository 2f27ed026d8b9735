"""A model by its name: from the cache of the hub, without the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kt_hf import KTAMXConfigError, KTAMXError, load_kt_model
from kt_hf.checkpoint import checkpoint_folder
from tests.support.cases import make_config
from tests.support.checkpoints import read_index, saved
from tests.support.helpers import MIXTRAL
from tests.support.patched import logits_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, sharded: bool) -> Path:
    """The folder of a model called somebody/mixtral, as the hub's client keeps it."""
    model = cache / "models--somebody--mixtral"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    return saved(MIXTRAL, model / "snapshots" / COMMIT, sharded=sharded)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_it_is_found_and_loaded(sharded: bool, tmp_path: Path) -> None:
    folder = cached(tmp_path, sharded)
    assert checkpoint_folder("somebody/mixtral", cache_dir=tmp_path) == folder
    by_name = load_kt_model("somebody/mixtral", make_config("torch"), cache_dir=tmp_path)
    by_path = load_kt_model(folder, make_config("torch"))
    assert by_name.name_or_path == "somebody/mixtral"
    assert torch.equal(logits_of(by_name, MIXTRAL.inputs()), logits_of(by_path, MIXTRAL.inputs()))


def test_what_is_not_in_the_cache_is_told(tmp_path: Path) -> None:
    folder = cached(tmp_path, sharded=True)
    lost = sorted(set(read_index(folder).values()))[1]
    (folder / lost).unlink()
    with pytest.raises(KTAMXError, match=lost):
        load_kt_model("somebody/mixtral", make_config("torch"), cache_dir=tmp_path)
    with pytest.raises(KTAMXConfigError, match="somebody/else"):
        checkpoint_folder("somebody/else", cache_dir=tmp_path)


def test_a_subfolder(tmp_path: Path) -> None:
    saved(MIXTRAL, tmp_path / "inside")
    model = load_kt_model(tmp_path, make_config("torch"), subfolder="inside")
    assert len(model._kt_wrappers) == 2
