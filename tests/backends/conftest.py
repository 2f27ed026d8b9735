"""Backends are tested in every dtype."""

from __future__ import annotations

from tests.experts.conftest import case as case
