"""Tensors of an adapter that are no expert's: each is accounted for by the settings, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kt_hf import KTAMXError
from kt_hf.adapters.adapter import PREFIX, Adapter
from kt_hf.adapters.embeddings import _check_shape
from kt_hf.adapters.other_tensors import OtherModule, sort_tensors
from kt_hf.system.files import Lazy

WHOLE = Lazy(torch.float32, (8, 4), lambda: torch.zeros(8, 4))
NORM, ROUTER = "model.norm", "model.layers.0.mlp.gate"


def test_modules_to_save_are_those_that_it_names() -> None:
    """Where it names one module, a whole tensor of another is still refused: loading would write over the base's."""
    config = {"modules_to_save": ["norm"]}
    assert list(sort_tensors({f"{PREFIX}{NORM}.weight": WHOLE}, PREFIX, config, Path("saved"))) == [NORM]
    both = {f"{PREFIX}{name}.weight": WHOLE for name in (NORM, ROUTER)}
    with pytest.raises(KTAMXError, match=rf"saved: .*{ROUTER}\.weight is no LoRA tensor, and not of modules_to_save"):
        sort_tensors(both, PREFIX, config, Path("saved"))


@pytest.mark.parametrize(("row", "fits"), [(-1, True), (0, False)], ids=["last", "after it"])
@pytest.mark.parametrize("vocabulary", [8, 3, 1])
def test_retrained_tokens_are_of_the_vocabulary(row: int, fits: bool, vocabulary: int) -> None:
    """The last row is taken, the one after it is refused; the hidden size, 5, has no say in it."""
    adapter = Adapter(Path("saved"), "kt", {"trainable_token_indices": [vocabulary + row]})
    module = OtherModule("model.embed_tokens", tokens=Lazy(torch.float32, (1, 5), lambda: torch.zeros(1, 5)))
    if fits:
        _check_shape(adapter, module, module, (vocabulary, 5))
        return
    with pytest.raises(KTAMXError, match=r"does not fit the base's, of shape"):
        _check_shape(adapter, module, module, (vocabulary, 5))
