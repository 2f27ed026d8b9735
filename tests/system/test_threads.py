"""PyTorch's threads are set for a block and put back, however it ends."""

from __future__ import annotations

import pytest
import torch

from kt_hf.system.threads import torch_threads


def test_set_inside_and_put_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), torch_threads(before + 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_none_changes_nothing() -> None:
    before = torch.get_num_threads()
    with torch_threads(None):
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
