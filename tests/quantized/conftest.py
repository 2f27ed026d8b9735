"""A Mixtral of sizes that INT8 and INT4 can split, in place of the tiny one."""

from __future__ import annotations

from tests.support.low_bit import case as case
from tests.support.low_bit import family as family
from tests.support.low_bit import wide_everywhere as wide_everywhere
