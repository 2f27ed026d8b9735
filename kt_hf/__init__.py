"""kt_hf: LoRA fine-tuning of mixture-of-experts models with a stock Hugging Face Trainer, experts on the CPU."""

from ._versions import check_versions

check_versions()

from .adapters import verify_adapter  # noqa: E402
from .callback import KTMoECallback  # noqa: E402
from .config import KTConfig  # noqa: E402
from .errors import (  # noqa: E402
    KTAMXBackwardError,
    KTAMXConfigError,
    KTAMXError,
    KTAMXForwardError,
    KTAMXModelNotSupportedError,
    KTAMXNotAvailableError,
)
from .experts import KTExperts  # noqa: E402
from .loading import load_kt_model  # noqa: E402
from .lora import kt_lora_config  # noqa: E402
from .patch import apply_kt_moe  # noqa: E402
from .peft_compat import install  # noqa: E402

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
    "apply_kt_moe",
    "kt_lora_config",
    "load_kt_model",
    "verify_adapter",
]
