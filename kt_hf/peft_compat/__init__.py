"""The one package that touches PEFT's internals."""

from .patches import install, unwrap_expert_parameters

__all__ = ["install", "unwrap_expert_parameters"]
