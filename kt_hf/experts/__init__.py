"""The layer that takes the place of a model's `experts` module. Of kt_hf it knows the backends and ranks."""

from .clipping import clip_grad_norm_
from .layer import KTExperts, kt_layers
from .params_view import LoraParamsView

__all__ = ["KTExperts", "LoraParamsView", "clip_grad_norm_", "kt_layers"]
