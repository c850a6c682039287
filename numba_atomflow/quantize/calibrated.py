"""Quantization with calibration text, layer by layer.

The forward pass uses the unquantized weights of the source, so the result of a layer does not depend on how earlier
layers were rounded. Memory holds one layer in float32, the statistics of its inputs, and the residual stream of all
calibration tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import fusion
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.free_memory import return_free_memory
from numba_atomflow.quantize.calibration import Calibration
from numba_atomflow.quantize.forward import LayerForward
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.layer import QuantizedLayer, quantize_layer
from numba_atomflow.quantize.projection import Method
from numba_atomflow.quantize.resume import ResumableJob
from numba_atomflow.quantize.threads import cores_for_blas, cores_for_kernels
from numba_atomflow.sources import WeightSource
from numba_atomflow.sources.base import slabs
from numba_atomflow.utils.progress import Progress


def quantize_layers(
    source: WeightSource, calibration: Calibration, method: Method, job: ResumableJob, report: Progress
) -> NDArray[np.float32]:
    """Quantize the layers that are not finished, and save each to `job`.

    Args:
        source: the model.
        calibration: tokens.
        method: quantizes a projection.
        job: the finished layers.
        report: called with a description, finished weights and total weights (of the layers).

    Returns:
        The residual stream after the last layer, float32 [sequences, T, H].
    """
    g, start = source.geometry, job.finished()
    shape = (*calibration.tokens.shape, g.hidden)
    stream = job.stream(start, shape) if start else _embed(source, calibration.tokens)
    per_layer = _layer_weights(g)
    for i in range(start, g.layers):
        report(f"layer {i}: calibrating", i * per_layer, g.layers * per_layer)

        def on_projection(projection: str, left: int, i: int = i) -> None:
            report(f"layer {i}: {projection}", (i + 1) * per_layer - left, g.layers * per_layer)

        job.save(i, _quantize(source, i, stream, method, on_projection), stream)
        return_free_memory()  # fragments would add to the next peak
    return stream


def _quantize(
    source: WeightSource, i: int, stream: NDArray[np.float32], method: Method, on_projection: Callable[[str, int], None]
) -> QuantizedLayer:
    """Calibrate and quantize layer i; updates the stream in place. Frees all memory but the result."""
    layer = _read_layer(source, i)
    inputs = _calibrate(source.geometry, layer, stream)
    return_free_memory()
    with cores_for_kernels():
        return quantize_layer(source.geometry, layer, inputs, method, on_projection)


def _calibrate(
    geometry: ModelGeometry, layer: Mapping[str, NDArray[np.float32]], stream: NDArray[np.float32]
) -> dict[str, Inputs]:
    """Run a layer on the stream [sequences, T, H], in place; returns statistics of each projection's inputs."""
    g = geometry
    inputs = {"qkv": Inputs(g.hidden), "o": Inputs(g.q_dim), "gate_up": Inputs(g.hidden), "down": Inputs(g.ffn)}
    forward = LayerForward(g, stream.shape[1])
    with cores_for_blas():
        for sequence in stream:
            forward.run(layer, sequence, inputs)
    for statistics in inputs.values():
        statistics.finish()
    return inputs


def _layer_weights(geometry: ModelGeometry) -> int:
    """Number of weights in a layer's projections."""
    g = geometry
    return g.hidden * (2 * g.q_dim + 2 * g.kv_dim + 3 * g.ffn)


def _embed(source: WeightSource, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the embedding for tokens [sequences, T], read in slabs: [sequences, T, H]."""
    name, stream = "model.embed_tokens.weight", np.empty((*tokens.shape, source.geometry.hidden), np.float32)
    for start, rows in read_slabs(source, name):
        inside = (tokens >= start) & (tokens < start + len(rows))
        stream[inside] = rows[tokens[inside] - start]
    return stream


def _read_layer(source: WeightSource, i: int) -> dict[str, NDArray[np.float32]]:
    """The weights of layer i as float32, by part name without ``layer.{i}.``."""
    prefix = f"layer.{i}."
    parts = {part: names for part, names in fusion(source.geometry).items() if part.startswith(prefix)}
    return {part.removeprefix(prefix): _read_part(source, names) for part, names in parts.items()}


def _read_part(source: WeightSource, names: Sequence[str]) -> NDArray[np.float32]:
    """Tensors, concatenated along rows."""
    shapes = [source.shape(name) for name in names]
    part = np.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), np.float32)
    filled = 0
    for name in names:
        for start, rows in read_slabs(source, name):
            part[filled + start : filled + start + len(rows)] = rows
        filled += source.shape(name)[0]
    return part


def read_slabs(source: WeightSource, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor in slabs of rows, each with the index of its first row."""
    rows, *width = source.shape(name)
    for start, stop in slabs(rows, width[0] if width else 1):
        yield start, source.read(name, start, stop)
