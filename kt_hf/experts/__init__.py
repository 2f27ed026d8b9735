"""The layer that takes the place of a model's `experts` module. Of kt_hf it knows the backends alone."""

from .layer import KTExperts, kt_layers
from .params_view import LoraParamsView

__all__ = ["KTExperts", "LoraParamsView", "kt_layers"]
