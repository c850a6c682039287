"""The kernels around the GEMMs of a prefill chunk: the checks of tests/sim on a GPU, and at the sizes of models."""

import pytest
from chunk_kernel_cases import CHUNK_ROPES, NORMS, check_embed_chunk, check_rms_norm_tiles, check_rope_chunk
from device_launch import chip
from kernel_cases import RopeCase

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.formats import FP8_E4M3

LARGE_NORMS = ((ActivationTiles(3072, 2048), 2041), (ActivationTiles(4096, 128, weight_bits=16), 127))
LARGE_ROPES = ((RopeCase(128, 16, 8, 20, norm=True), 17), (RopeCase(64, 14, 2, 16, bias=True), 16))


@pytest.mark.parametrize(("x", "tokens"), NORMS + LARGE_NORMS, ids=str)
def test_rms_norm_tiles(x: ActivationTiles, tokens: int) -> None:
    check_rms_norm_tiles(x, tokens)


@pytest.mark.parametrize(("case", "count"), CHUNK_ROPES + LARGE_ROPES, ids=str)
def test_rope_chunk(case: RopeCase, count: int) -> None:
    check_rope_chunk(case, count)


@pytest.mark.parametrize("k_tile", [0, 4])
@pytest.mark.parametrize(("padded", "count"), [(4, 3), (2048, 2041)])
def test_embed_chunk(padded: int, count: int, k_tile: int) -> None:
    check_embed_chunk(PrepackedLayout(1000, 576, format=chip().native(FP8_E4M3), k_tile=k_tile), padded, count)
