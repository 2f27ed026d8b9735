"""Adapters: conversion between formats, and the manifest that tells a whole save from a part of one."""

from .adapter import Adapter, Projection
from .check_export import check_export
from .convert import FORMATS, convert, open_adapter
from .load import load_adapter, start_from
from .manifest import publish, seal
from .manifest_file import MANIFEST
from .verify import check_checkpoint, last_complete, tell_interrupted, verify_adapter

__all__ = [
    "FORMATS",
    "MANIFEST",
    "Adapter",
    "Projection",
    "check_checkpoint",
    "check_export",
    "convert",
    "last_complete",
    "load_adapter",
    "open_adapter",
    "publish",
    "seal",
    "start_from",
    "tell_interrupted",
    "verify_adapter",
]
