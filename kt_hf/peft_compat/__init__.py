"""Everything that touches PEFT's internals: the functions of PEFT and transformers that are replaced, and by what.

`patches.PATCHES` is the table; `internals` reads what is not replaced. tests/peft_compat fails when PEFT changes what
it relies on. Importing this package
imports neither PEFT nor PyTorch.
"""

from .patches import PATCHES, install

__all__ = ["PATCHES", "install"]
