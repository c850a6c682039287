"""numba-atomflow: single-stream LLM inference in readable Python.

The names below are the public API. They are imported at their first use: ``import numba_atomflow`` stays cheap, and the
lower packages (`ops`, `memory`) can import `numba_atomflow.errors` and `numba_atomflow.home` without a cycle.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, Generation
    from numba_atomflow.errors import AtomFlowError
    from numba_atomflow.geometry import ModelGeometry
    from numba_atomflow.sampling import SamplingParams
    from numba_atomflow.state.snapshot import KvSnapshot

__version__ = "0.1.0"

_MODULES = {
    "Engine": "numba_atomflow.engine",
    "Generation": "numba_atomflow.engine",
    "AtomFlowError": "numba_atomflow.errors",
    "KvSnapshot": "numba_atomflow.state.snapshot",
    "ModelGeometry": "numba_atomflow.geometry",
    "SamplingParams": "numba_atomflow.sampling",
}

__all__ = ["AtomFlowError", "Engine", "Generation", "KvSnapshot", "ModelGeometry", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'numba_atomflow' has no attribute {name!r}")
