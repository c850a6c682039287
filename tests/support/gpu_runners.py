"""The sandbox's runner on a GPU, ready to run a small model."""

from contextlib import ExitStack

from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sandbox.gpu_runner import GpuRunner
from numba_atomflow.sandbox.runner import CacheSizes


def make_runner(geometry: ModelGeometry) -> GpuRunner:
    """A runner with random weights and room for one sequence of 16 positions; closed again if it cannot be prepared."""
    model = RandomModel(geometry)
    sizes = CacheSizes(slots=32, block_sizes=(16,), sequences=1, longest=16)
    with ExitStack() as on_error:
        runner = GpuRunner(model.geometry, WeightArrays(model), sizes)
        on_error.callback(runner.close)
        runner.prepare(None)
        on_error.pop_all()
    return runner
