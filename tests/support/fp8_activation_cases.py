"""Kernels that make FP8 activations, against their reference: in the simulator, or on a GPU."""

import numpy as np
from kernel_cases import generator, launch, poisoned

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.fp8_activations import quantize_activations
from numba_atomflow.ops.cuda.token.quantize_tiles import (
    THREADS,
    QuantizeTilesArguments,
    make_quantize_tiles,
    quantize_tiles_ctas,
)
from numba_atomflow.ops.fp8 import dequantize_groups

QUANTIZED = ((256, 8, 8), (200, 48, 40))  # K, capacity, tokens


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
