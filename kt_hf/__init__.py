"""kt_hf: LoRA fine-tuning of mixture-of-experts models with a stock Hugging Face Trainer, experts on the CPU."""

import sys

from ._versions import check_versions
from .errors import KTAMXNotAvailableError

try:
    check_versions()
except KTAMXNotAvailableError as _error:
    if sys.argv[0].endswith("kt-hf"):  # the command: a message, no traceback
        print(f"kt-hf: {_error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise

from .adapters import verify_adapter
from .callback import KTMoECallback
from .config import KTConfig
from .errors import KTAMXBackwardError, KTAMXConfigError, KTAMXError, KTAMXForwardError, KTAMXModelNotSupportedError
from .experts.layer import KTExperts
from .loading import load_kt_model
from .lora import kt_lora_config
from .patch import apply_kt_moe
from .peft_compat import install
from .placement import Placement, count_experts, read_placement

install()  # at import, so that an adapter of ours loaded before the patch is refused, not dropped

__version__ = "0.1.0"

__all__ = [
    "KTAMXBackwardError",
    "KTAMXConfigError",
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
