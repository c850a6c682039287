"""The kernels around the GEMMs of a prefill chunk in numba's CUDA simulator (checks: chunk_kernel_cases.py)."""

import pytest
from chunk_kernel_cases import (
    CHUNK_ROPES,
    NORMS,
    check_embed_chunk,
    check_rms_norm_tiles,
    check_rope_chunk,
)
from kernel_cases import RopeCase

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout


@pytest.mark.parametrize(("x", "tokens"), NORMS, ids=str)
def test_rms_norm_tiles(x: ActivationTiles, tokens: int) -> None:
    check_rms_norm_tiles(x, tokens)


@pytest.mark.parametrize(("case", "count"), CHUNK_ROPES, ids=str)
def test_rope_chunk(case: RopeCase, count: int) -> None:
    check_rope_chunk(case, count)


def test_embed_chunk() -> None:
    check_embed_chunk(PrepackedLayout(40, 130), padded=4, count=3)
