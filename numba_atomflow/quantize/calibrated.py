"""A model quantised by what its weights do to calibration text, layer by layer.

The calibration text goes through the source's own weights (not through those that are quantised already): a layer's
result depends on nothing that was rounded before it. In memory are one layer in float32, what is remembered of its
inputs, and the residual stream of all calibration tokens.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import fusion
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.quantize.calibration import Calibration
from numba_atomflow.quantize.forward import LayerForward
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.layer import QuantisedLayer, quantize_layer
from numba_atomflow.quantize.projection import Method
from numba_atomflow.quantize.threads import cores_for_blas, cores_for_kernels
from numba_atomflow.quantize.unfinished import Unfinished
from numba_atomflow.sources import WeightSource
from numba_atomflow.sources.base import slabs
from numba_atomflow.utils.progress import Progress


def quantize_layers(
    source: WeightSource, calibration: Calibration, method: Method, unfinished: Unfinished, report: Progress
) -> NDArray[np.float32]:
    """Quantise all layers that are not done yet, and keep each in `unfinished`.

    Args:
        source: the model.
        calibration: tokens.
        method: how to quantise a projection.
        unfinished: what is done, and where it is kept.
        report: called with what is being done, weights finished and weights in all (those of the layers).

    Returns:
        The residual stream after the last layer, float32 [sequences, T, H].
    """
    g, start = source.geometry, unfinished.finished()
    shape = (*calibration.tokens.shape, g.hidden)
    stream = unfinished.stream(start, shape) if start else _embed(source, calibration.tokens)
    each = _layer_weights(g)
    for i in range(start, g.layers):
        report(f"layer {i}: calibrating", i * each, g.layers * each)

        def starting(projection: str, left: int, i: int = i) -> None:
            report(f"layer {i}: {projection}", (i + 1) * each - left, g.layers * each)

        unfinished.save(i, _quantize(source, i, stream, method, starting), stream)
        _return_freed_memory()
    return stream


def _quantize(
    source: WeightSource, i: int, stream: NDArray[np.float32], method: Method, starting: Callable[[str, int], None]
) -> QuantisedLayer:
    """Layer i, through which the stream is taken. Nothing of it stays in memory but what is returned."""
    layer = _read_layer(source, i)
    inputs = _calibrate(source.geometry, layer, stream)
    _return_freed_memory()
    with cores_for_kernels():
        return quantize_layer(source.geometry, layer, inputs, method, starting)


def _calibrate(
    geometry: ModelGeometry, layer: Mapping[str, NDArray[np.float32]], stream: NDArray[np.float32]
) -> dict[str, Inputs]:
    """Take the stream [sequences, T, H] through a layer, in place; what each projection was multiplied with."""
    g = geometry
    inputs = {"qkv": Inputs(g.hidden), "o": Inputs(g.q_dim), "gate_up": Inputs(g.hidden), "down": Inputs(g.ffn)}
    forward = LayerForward(g, stream.shape[1])
    with cores_for_blas():
        for sequence in stream:
            forward.run(layer, sequence, inputs)
    for each in inputs.values():
        each.finish()
    return inputs


def _return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps it in fragments, which would add to the next peak."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _layer_weights(geometry: ModelGeometry) -> int:
    """Weights of one layer's projections."""
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
    """The layer's weights as float32, by the names of its parts without ``layer.{i}.``."""
    prefix = f"layer.{i}."
    parts = {part: names for part, names in fusion(source.geometry).items() if part.startswith(prefix)}
    return {part.removeprefix(prefix): _read_part(source, names) for part, names in parts.items()}


def _read_part(source: WeightSource, names: Sequence[str]) -> NDArray[np.float32]:
    """Tensors one below the other."""
    shapes = [source.shape(name) for name in names]
    part = np.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), np.float32)
    filled = 0
    for name in names:
        for start, rows in read_slabs(source, name):
            part[filled + start : filled + start + len(rows)] = rows
        filled += source.shape(name)[0]
    return part


def read_slabs(source: WeightSource, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor some rows at a time, each time with the number of the first."""
    rows, *width = source.shape(name)
    for start, stop in slabs(rows, width[0] if width else 1):
        yield start, source.read(name, start, stop)
