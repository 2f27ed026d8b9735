"""Experts on a GPU: resident there, or streamed to it from pinned host memory."""
