"""Kernels that make FP8 activations, against their references: in the simulator, or on a GPU."""

from typing import Any

import numpy as np
from kernel_cases import EPS, generator, launch, poisoned
from numpy.typing import NDArray

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.fp8_activations import quantize_activations
from numba_atomflow.ops.cuda.token.quantize_tiles import (
    THREADS,
    QuantizeTilesArguments,
    make_quantize_tiles,
    quantize_tiles_ctas,
)
from numba_atomflow.ops.cuda.token.rms_norm import RmsNormTilesArguments, rms_norm_tiles_threads
from numba_atomflow.ops.cuda.token.rms_norm_fp8 import make_rms_norm_fp8
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.ops.rms_norm import rms_norm_reference

QUANTIZED = ((256, 8, 8), (200, 48, 40))  # K, capacity, tokens
NORMED = ((256, 8, 3), (1100, 16, 2), (68, 8, 1))


def check_quantize_tiles(in_features: int, capacity: int, tokens: int) -> None:
    """Bit for bit, in every token and in no other; a token of NaN stays alone."""
    rng = generator(in_features, capacity, tokens)
    values = rng.standard_normal((tokens, in_features)) * np.exp2(rng.integers(-12, 6, (tokens, in_features)))
    values[0] = 0
    values[1] = np.nan
    half = values.astype(np.float16)
    source, target = ActivationTiles(in_features, capacity), ActivationTiles(in_features, capacity, 8)
    x, y = source.pack(half), poisoned(target.words, dtype=np.uint32)
    arguments = QuantizeTilesArguments(x, y, tokens)
    launch(make_quantize_tiles(source, target), quantize_tiles_ctas(target, tokens), THREADS, 0, arguments)
    got, expected = target.unpack(y), dequantize_groups(*quantize_activations(np.nan_to_num(half).astype(np.float32)))
    np.testing.assert_array_equal(np.delete(got[:tokens], 1, axis=0), np.delete(expected, 1, axis=0))
    assert np.isnan(got[1]).all()
    assert np.isnan(got[tokens:]).all(), "wrote tokens beyond the last"


def check_rms_norm_fp8(in_features: int, capacity: int, tokens: int) -> None:
    """Every value off by half a step at most, but for float32's rounding of what is quantized."""
    rng = generator(in_features, capacity, tokens)
    residual = (rng.standard_normal((tokens, in_features)) * np.exp2(rng.integers(-6, 6, in_features))).astype("f4")
    weight = rng.uniform(0.5, 1.5, in_features).astype(np.float32)
    tiles = ActivationTiles(in_features, capacity, 8)
    words = poisoned(tiles.words, dtype=np.uint32)
    arguments = RmsNormTilesArguments(residual.reshape(-1), weight, words)
    launch(make_rms_norm_fp8(tiles, EPS), tokens, rms_norm_tiles_threads(tiles), 0, arguments)
    check_half_a_step(tiles, words, rms_norm_reference(residual.astype(np.float64), weight, EPS))
    padded = ActivationTiles(tiles.blocks * 128, capacity, 8).unpack(words)
    assert not padded[:tokens, in_features:].any(), "the padding of K is not zero"
    assert np.isnan(padded[tokens:]).all(), "wrote tokens beyond the last"


def check_half_a_step(tiles: ActivationTiles, words: NDArray[np.uint32], expected: NDArray[Any]) -> None:
    """The first tokens of FP8 tiles are `expected` [tokens, K], quantized: scales to 1e-5, codes to nearest."""
    tokens = len(expected)
    scales = words[tiles.scales_start :].view(np.float32).reshape(tiles.blocks, -1).T[:tokens]
    np.testing.assert_allclose(scales, quantize_activations(expected.astype(np.float32))[1], rtol=1e-5)
    scale = np.repeat(scales, 128, axis=1)[:, : tiles.in_features]
    step = np.maximum(np.abs(expected) / 8, scale * 2.0**-9)  # three bits of mantissa; subnormals below 2^-6
    assert (np.abs(tiles.unpack(words)[:tokens] - expected) <= step / 2 * 1.001).all()
