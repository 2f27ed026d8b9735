"""Everything that touches PEFT's internals: the functions of PEFT and transformers that are replaced, and by what.

`patches.PATCHES` is the table. tests/peft_compat fails when PEFT changes what it relies on.
"""

from .patches import PATCHES, install
from .stock_lora import unwrap_expert_parameters

__all__ = ["PATCHES", "install", "unwrap_expert_parameters"]
