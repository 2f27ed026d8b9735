"""Whether the installed kt-kernel has SFT operators, and whether this CPU can run them."""

from __future__ import annotations

import functools
import logging
import platform
import sys

from ...errors import KTAMXNotAvailableError
from ...system.cpu import cpu_features
from ..base import Availability
from .native_code import native_output_to_log, subnormals
from .operators import OPERATORS

logger = logging.getLogger(__name__)


_WHEELS = "it has wheels for Python 3.11 and 3.12 on Linux x86-64 alone"


def has_wheels() -> bool:
    """Whether kt-kernel can be installed from a package index, by the same marks as in pyproject.toml."""
    return (sys.platform, platform.machine()) == ("linux", "x86_64") and tuple(sys.version_info) < (3, 13)


@functools.cache
def availability(backend: str = "AMXBF16") -> Availability:
    """Whether SFT operators run on this machine: the package, its variant, and the CPU's instructions.

    Args:
        backend: The value of `kt_backend` that asks for them.
    """
    features, operators = cpu_features(), OPERATORS[backend]
    try:
        with native_output_to_log(logger), subnormals():
            import kt_kernel
            from kt_kernel import kt_kernel_ext
    except ImportError as error:
        way = "install it with: pip install kt-kernel==0.7.2" if has_wheels() else _WHEELS
        return Availability(False, f"kt-kernel cannot be imported ({error}); {way}")
    variant = kt_kernel.__cpu_variant__
    details = {"variant": variant, "version": kt_kernel.__version__, "cpu": features.name}
    if variant not in operators.variants or not hasattr(kt_kernel_ext.moe, operators.class_name):
        which = "SFT operators" if backend == "AMXBF16" else f"operators for {backend}"
        needed = "AMX, AVX512-BF16 or AVX2" if "avx2" in operators.variants else "AMX or AVX512-BF16"
        return Availability(False, f"kt-kernel's {variant} variant has no {which} (they need {needed})", details)
    # The variant can be forced by KT_KERNEL_CPU_VARIANT; instructions the CPU lacks would end the process.
    has = {"amx": features.amx, "avx512_bf16": features.avx512_bf16, "avx2": features.avx2}
    if not has[variant]:
        return Availability(False, f"kt-kernel's {variant} variant needs instructions this CPU lacks", details)
    if lacking := [name for name in operators.needs if not getattr(features, name)]:
        return Availability(False, f"{backend} needs {', '.join(lacking)}, which this CPU lacks", details)
    return Availability(True, f"kt-kernel {kt_kernel.__version__}, {variant} variant", details)


def bytes_per_weight(backend: str) -> float:
    """Memory of a weight of experts, packed once for the variant of kt-kernel that runs on this machine.

    Args:
        backend: A key of `OPERATORS`.
    """
    operators = OPERATORS[backend]
    on_avx2 = availability(backend).details.get("variant") == "avx2"
    return operators.bytes_on_avx2 if on_avx2 and operators.bytes_on_avx2 else operators.bytes_per_weight


def check_available(backend: str) -> Availability:
    """What `availability` says where the operators run.

    Args:
        backend: The value of `kt_backend` that asks for them, also for the message.

    Raises:
        KTAMXNotAvailableError: They do not run on this machine; saying why, and what does.
    """
    available = availability(backend)
    if not available.ok:
        raise KTAMXNotAvailableError(
            f"kt_backend={backend} cannot run: {available.reason}. kt_backend=torch runs on any machine "
            "(kt_backend=auto picks by itself)."
        )
    return available
