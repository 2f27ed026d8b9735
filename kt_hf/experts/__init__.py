"""The layer that takes the place of a model's `experts` module. Of kt_hf it knows the backends alone."""

from .layer import KTExperts, LoraParamsView, kt_layers

__all__ = ["KTExperts", "LoraParamsView", "kt_layers"]
