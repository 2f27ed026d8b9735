"""What all modules here need: TRL, one PyTorch thread, and a tokenizer of numbered words."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from tests.helpers import one_torch_thread as one_torch_thread
from tests.test_training import tokenizer as tokenizer
