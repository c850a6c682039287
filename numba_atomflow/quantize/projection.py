"""A quantized projection and its output error."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.quantize.inputs import Inputs, output_error

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """FP8 weights of a projection.

    Attributes:
        codes: uint8 [N, K]. scales: float32 [N, ceil(K / 128)].
        channels: float32 [K], the channel scales: weights are multiplied by them, inputs must be divided by them.
            None: all are 1.
        error: mean squared error of the outputs on calibration inputs.
    """

    codes: NDArray[np.uint8]
    scales: Array
    error: float
    channels: Array | None = None


# Weights [N, K], statistics of the inputs, channels that share a scale.
Method = Callable[[Array, Inputs, "Sharing"], Quantized]


@dataclass(frozen=True)
class Sharing:
    """Input channels that must have the same scale: the same channel of `ratio` consecutive heads.

    The inputs of the output projection are attention heads. With GQA several of them come from one head of v, and the
    scales are folded into the rows of v.
    """

    head_dim: int = 1
    ratio: int = 1

    def mean(self, channels: Array) -> Array:
        """Channels [K], each replaced by the mean of those that share its scale."""
        heads = channels.reshape(-1, self.ratio, self.head_dim)
        return np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)

    def distinct(self, channels: Array) -> Array:
        """One channel of each set that shares a scale: [K / ratio]."""
        return channels.reshape(-1, self.ratio, self.head_dim)[:, 0].reshape(-1)


def evaluate(
    weights: Array, gram: Array, codes: NDArray[np.uint8], scales: Array, channels: Array | None = None
) -> Quantized:
    """A `Quantized` with its error; `weights` and `gram` are already scaled by `channels`."""
    return Quantized(codes, scales, output_error(weights, codes, scales, gram), channels)
