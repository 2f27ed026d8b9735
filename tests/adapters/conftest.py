"""Fixtures of the adapter tests."""

from __future__ import annotations

from tests.families.conftest import _one_torch_thread as _one_torch_thread
from tests.families.conftest import family as family
