"""numba-atomflow: a single-stream LLM engine that a person can read.

The names below are the public API. They are loaded on first use, so that ``import numba_atomflow`` stays light
and the lower packages (`ops`, `memory`) can stand on `numba_atomflow.errors` and `numba_atomflow.home` without a cycle.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, Generation
    from numba_atomflow.errors import AtomFlowError
    from numba_atomflow.geometry import ModelGeometry
    from numba_atomflow.sampling import SamplingParams

__version__ = "0.1.0"

_HOME_OF = {
    "Engine": "numba_atomflow.engine",
    "Generation": "numba_atomflow.engine",
    "AtomFlowError": "numba_atomflow.errors",
    "ModelGeometry": "numba_atomflow.geometry",
    "SamplingParams": "numba_atomflow.sampling",
}

__all__ = ["AtomFlowError", "Engine", "Generation", "ModelGeometry", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'numba_atomflow' has no attribute {name!r}")
