"""Checkpoints, one safetensors file per model: format, writer, random weights, lookup by name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_atomflow.checkpoint.format import Checkpoint as Checkpoint
    from numba_atomflow.checkpoint.format import fusion as fusion
    from numba_atomflow.checkpoint.writer import CheckpointWriter as CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "fusion"]

_MODULES = {"Checkpoint": "format", "CheckpointWriter": "writer", "fusion": "format"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
