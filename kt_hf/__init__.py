"""kt_hf: LoRA fine-tuning of mixture-of-experts models with a stock Hugging Face Trainer, experts on CPU or GPU.

The public names are imported when they are first used: `import kt_hf` imports neither PyTorch, transformers nor PEFT.
It does see to it that PEFT refuses an adapter of kt_hf for a model that is not patched, whichever of the two is
imported first.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._versions import __version__ as __version__
from ._versions import check_versions
from .errors import (
    KTAMXBackwardError,
    KTAMXConfigError,
    KTAMXDiskFullError,
    KTAMXError,
    KTAMXForwardError,
    KTAMXModelNotSupportedError,
    KTAMXNotAvailableError,
)

try:
    check_versions()
except KTAMXNotAvailableError as _error:
    if sys.argv[0].endswith("kt-hf"):  # the command: a message, no traceback
        print(f"kt-hf: {_error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise

from .peft_compat import install

if TYPE_CHECKING:
    from .adapters import verify_adapter
    from .callback import KTMoECallback
    from .config import KTConfig
    from .experts.layer import KTExperts
    from .loading import load_kt_model
    from .lora import kt_lora_config
    from .patch import apply_kt_moe
    from .placement import Placement, count_experts, read_placement

install()  # at import, so that an adapter of ours loaded before the patch is refused, not dropped

__all__ = [
    "KTAMXBackwardError",
    "KTAMXConfigError",
    "KTAMXDiskFullError",
    "KTAMXError",
    "KTAMXForwardError",
    "KTAMXModelNotSupportedError",
    "KTAMXNotAvailableError",
    "KTConfig",
    "KTExperts",
    "KTMoECallback",
    "Placement",
    "apply_kt_moe",
    "count_experts",
    "kt_lora_config",
    "load_kt_model",
    "read_placement",
    "verify_adapter",
]

_MODULES = {
    "KTConfig": "config",
    "KTExperts": "experts.layer",
    "KTMoECallback": "callback",
    "Placement": "placement",
    "apply_kt_moe": "patch",
    "count_experts": "placement",
    "kt_lora_config": "lora",
    "load_kt_model": "loading",
    "read_placement": "placement",
    "verify_adapter": "adapters",
}
_PACKAGES = ("adapters", "backends", "builtin", "checkpoint", "experts", "monitoring", "placement", "quantized")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
