"""Gates: what lies between an expert's two products, and which one a module has."""

from .gate import ACTIVATIONS, PLAIN, Gate

__all__ = ["ACTIVATIONS", "PLAIN", "Gate"]
