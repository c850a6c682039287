"""Quantization of one decoder layer: four projections, with channel scales folded into the preceding weights.

The channel scales s of a projection multiply its columns, so its inputs must be divided by s. This is folded into the
norm weight before qkv and gate_up, the rows of v before o, and the rows of up before down. Dividing a row changes its
group scales and not its codes: folding causes no second rounding, and its order does not matter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import quantize_groups
from numba_atomflow.quantize.inputs import Inputs, output_energy
from numba_atomflow.quantize.projection import Method, Sharing, evaluate

PROJECTIONS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class QuantizedLayer:
    """The tensors of a layer by their checkpoint names without ``layer.{i}.``, and their errors.

    Attributes:
        errors: by projection, the relative L2 error of its outputs: of round-to-nearest, and of this result.
    """

    tensors: dict[str, NDArray[Any]]
    errors: dict[str, tuple[float, float]]


def quantize_layer(
    geometry: ModelGeometry,
    layer: dict[str, NDArray[np.float32]],
    inputs: Mapping[str, Inputs],
    method: Method,
    on_projection: Callable[[str, int], None] = lambda _projection, _weights_left: None,
) -> QuantizedLayer:
    """Quantize a layer.

    Args:
        geometry: of the model.
        layer: its weights by part; each projection is removed after use, to free its memory.
        inputs: statistics of the inputs of each projection, finished.
        method: quantizes one projection.
        on_projection: called before each projection with its name and the number of weights left.
    """
    tensors: dict[str, NDArray[Any]] = {name: part.copy() for name, part in layer.items() if part.ndim == 1}
    errors, channels = {}, {}
    for name in PROJECTIONS:
        on_projection(name, sum(part.size for part in layer.values() if part.ndim > 1))
        weights, gram = layer.pop(name), inputs[name].gram
        sharing = Sharing(geometry.head_dim, geometry.gqa_ratio) if name == "o" else Sharing()
        result = method(weights, inputs[name], sharing)
        energy = max(output_energy(weights, gram), float(np.finfo(np.float32).tiny))
        nearest = evaluate(weights, gram, *quantize_groups(weights)).error
        errors[name] = (float(np.sqrt(nearest / energy)), float(np.sqrt(result.error / energy)))
        tensors |= {f"{name}.weight": result.codes, f"{name}.scale": result.scales}
        if result.channels is not None:
            channels[name] = sharing.distinct(result.channels)
    _fold(geometry, tensors, channels)
    return QuantizedLayer(tensors, errors)


def _fold(geometry: ModelGeometry, tensors: dict[str, NDArray[Any]], channels: Mapping[str, NDArray[Any]]) -> None:
    """Divide the weights before each projection by its channel scales, in place."""
    g = geometry
    v, up = slice(g.q_dim + g.kv_dim, None), slice(g.ffn, None)
    for name, scales in channels.items():
        match name:
            case "qkv":
                tensors["attention_norm"] /= scales
            case "o":
                tensors["qkv.scale"][v] /= scales[:, None]
                if g.qkv_bias:
                    tensors["qkv_bias"][v] /= scales
            case "gate_up":
                tensors["ffn_norm"] /= scales
            case "down":
                tensors["gate_up.scale"][up] /= scales[:, None]
