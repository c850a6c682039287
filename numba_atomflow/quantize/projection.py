"""A quantised projection, and the choice between two of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.quantize.inputs import Inputs, output_error

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Quantised:
    """FP8 weights of a projection.

    Attributes:
        codes: uint8 [N, K]. scales: float32 [N, ceil(K / 128)].
        channels: float32 [K]; the weights were multiplied by them column by column, and the inputs must be divided by
            them. None: all are 1.
        error: mean |difference of outputs|^2 on calibration inputs.
    """

    codes: NDArray[np.uint8]
    scales: Array
    error: float
    channels: Array | None = None


# Weights [N, K], what calibration knows of the inputs, and how many neighbouring heads of the input (of which width)
# must share their channels' scales.
Method = Callable[[Array, Inputs, "Sharing"], Quantised]


@dataclass(frozen=True)
class Sharing:
    """Which channels of an input must have the same scale: `ratio` consecutive heads, channel by channel.

    The output projection's inputs are attention heads; with GQA several of them are made of one head of v, into whose
    rows the scales are folded.
    """

    head_dim: int = 1
    ratio: int = 1

    def mean(self, channels: Array) -> Array:
        """Channels [K], those that share replaced by their mean."""
        heads = channels.reshape(-1, self.ratio, self.head_dim)
        return np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)

    def distinct(self, channels: Array) -> Array:
        """One of each that share: [K / ratio]."""
        return channels.reshape(-1, self.ratio, self.head_dim)[:, 0].reshape(-1)


def quantised(
    weights: Array, gram: Array, codes: NDArray[np.uint8], scales: Array, channels: Array | None = None
) -> Quantised:
    """With its error: `weights` and `gram` are those that `codes` and `scales` stand for (scaled by `channels`)."""
    return Quantised(codes, scales, output_error(weights, codes, scales, gram), channels)
