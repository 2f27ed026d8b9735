"""Fixtures of the tests of loading."""

from __future__ import annotations

from tests.families.conftest import family as family
from tests.helpers import one_torch_thread as one_torch_thread
