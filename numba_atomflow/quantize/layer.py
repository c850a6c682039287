"""One decoder layer: its four projections quantised, channel scales folded into what comes before them.

A projection's channel scales s multiply its columns, so what feeds it must be divided by s: the norm before qkv and
before gate and up; the rows of v before o; the rows of up before down. A row divided by a number has the same FP8 codes
under group scales divided by that number: folding into rows costs no second rounding, and needs no order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import quantize_groups
from numba_atomflow.quantize.inputs import Inputs, output_energy
from numba_atomflow.quantize.projection import Method, Sharing, quantised

PROJECTIONS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class QuantisedLayer:
    """The layer's tensors by their names in a checkpoint, without ``layer.{i}.``; and what calibration says of them.

    Attributes:
        errors: by projection, the relative error of its outputs, |difference| / |output|: rounded to nearest, and as it
            is here.
    """

    tensors: dict[str, NDArray[Any]]
    errors: dict[str, tuple[float, float]]


def quantize_layer(
    geometry: ModelGeometry,
    layer: dict[str, NDArray[np.float32]],
    inputs: Mapping[str, Inputs],
    method: Method,
    starting: Callable[[str, int], None] = lambda _projection, _left: None,
) -> QuantisedLayer:
    """Quantise a layer.

    Args:
        geometry: of the model.
        layer: its weights by part; each projection is taken out as soon as it is done with.
        inputs: finished, of each projection.
        method: how to quantise one projection.
        starting: called before each projection with its name and the number of weights left.
    """
    tensors: dict[str, NDArray[Any]] = {name: part.copy() for name, part in layer.items() if part.ndim == 1}
    errors, channels = {}, {}
    for name in PROJECTIONS:
        starting(name, sum(part.size for part in layer.values() if part.ndim > 1))
        weights, gram = layer.pop(name), inputs[name].gram
        sharing = Sharing(geometry.head_dim, geometry.gqa_ratio) if name == "o" else Sharing()
        result = method(weights, inputs[name], sharing)
        energy = max(output_energy(weights, gram), float(np.finfo(np.float32).tiny))
        rounded = quantised(weights, gram, *quantize_groups(weights)).error
        errors[name] = (float(np.sqrt(rounded / energy)), float(np.sqrt(result.error / energy)))
        tensors |= {f"{name}.weight": result.codes, f"{name}.scale": result.scales}
        if result.channels is not None:
            channels[name] = sharing.distinct(result.channels)
    _fold(geometry, tensors, channels)
    return QuantisedLayer(tensors, errors)


def _fold(geometry: ModelGeometry, tensors: dict[str, NDArray[Any]], channels: Mapping[str, NDArray[Any]]) -> None:
    """Divide what feeds each projection by the projection's channel scales, in place."""
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
