"""A warp of the persistent kernel and one stage of its pipeline: every number of groups, and 8-row tiles."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator, launch, poisoned, relative_error, within
from numba import cuda, float32, uint32
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import (
    HALF_GROUP_WORDS,
    PrepackedLayout,
    prepack_fp16_reference,
    prepack_reference,
)
from numba_atomflow.ops.cuda.persistent.projection import make_multiply
from numba_atomflow.ops.cuda.persistent.schedule import K_TILE_GROUPS
from numba_atomflow.ops.cuda.persistent.staging import swizzled
from numba_atomflow.ops.formats import FP8_E4M3, FP16
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups

STAGE, SPARE = 1, 192  # the stage that is multiplied; words after x that are read, and must not matter


def multiplied(
    layout: PrepackedLayout, stage: NDArray[np.uint32], x: NDArray[np.float16], split_rows: int
) -> NDArray[np.float32]:
    """Sums of rows 0 to 15, by a warp; NaN everywhere but in the stage and in x."""
    stage_words = layout.k_tile_words
    memory = poisoned((STAGE + 1) * stage_words + x.size // 2 + SPARE, dtype=np.uint32)
    memory[STAGE * stage_words :][: stage.size] = stage
    place, pairs = (STAGE + 1) * stage_words, x.view(np.uint32)
    for word in range(pairs.size):
        memory[place + swizzled(word)] = pairs[word]
    shape: Any = SimpleNamespace(stage_words=stage_words, layouts=(layout,))
    multiply, groups = make_multiply(shape, fp16=layout.format.bits == 16), min(layout.groups, K_TILE_GROUPS)
    assert layout.group_in_features * groups * (1 + (split_rows > 0)) == x.size

    @ptx.kernel(32, 1)
    def warp(given, sums):
        words, floats = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        lane = np.uint32(cuda.threadIdx.x)
        if lane == 0:
            for word in range(len(given)):
                words[word] = given[word]
        ptx.sync_warp()
        total = multiply(words, floats, np.uint32(STAGE), np.uint32(place), np.uint32(split_rows), groups, lane)
        if lane % 4 == 0:
            sums[lane // 4] = total
        if lane % 4 == 2:
            sums[lane // 4 + 8] = total

    sums = poisoned(16)
    launch(warp, 1, 32, 4 * memory.size, memory, sums)
    return sums


@pytest.mark.parametrize(
    ("groups", "halves"), [(1, False), (2, False), (3, False), (4, False), (2, True), (4, True)], ids=str
)
def test_a_k_tile_of_so_many_groups(groups: int, halves: bool) -> None:
    rng = generator(groups, halves)
    in_features = groups * (64 if halves else 128)
    layout = PrepackedLayout(16, in_features, format=FP16 if halves else FP8_E4M3, k_tile=K_TILE_GROUPS)
    values = rng.standard_normal((16, in_features)).astype(np.float32)
    if halves:
        weights, stage = values.astype(np.float16), prepack_fp16_reference(values.astype(np.float16), layout)
    else:
        codes, scales = quantize_groups(values)
        weights, stage = dequantize_groups(codes, scales), prepack_reference(codes, scales, layout)
    x = rng.standard_normal(in_features).astype(np.float16)
    sums = multiplied(layout, stage, x, 0)
    within("a k-tile's sums", relative_error(sums, weights.astype(np.float64) @ x.astype(np.float64)), 1e-5)


@pytest.mark.parametrize("lower", [False, True])
def test_the_same_rows_of_two_k_tiles(lower: bool) -> None:
    """Sums 0-7 are those of 8 rows over the first k-tile, 8-15 those of the same rows over the second."""
    rng = generator(int(lower))
    layout = PrepackedLayout(16, 2 * K_TILE_GROUPS * 128, k_tile=K_TILE_GROUPS)
    codes, scales = quantize_groups(rng.standard_normal((16, 1024)).astype(np.float32))
    k_tiles = prepack_reference(codes, scales, layout).reshape(2, 2, K_TILE_GROUPS * HALF_GROUP_WORDS)
    x = rng.standard_normal(1024).astype(np.float16)
    sums = multiplied(layout, k_tiles[:, int(lower)].reshape(-1), x, K_TILE_GROUPS * 64)
    rows = dequantize_groups(codes, scales).astype(np.float64)[8 * lower : 8 * lower + 8].reshape(8, 2, 512)
    expected = np.einsum("rcx,cx->cr", rows, x.astype(np.float64).reshape(2, 512)).reshape(-1)
    within("an 8-row tile's sums", relative_error(sums, expected), 1e-5)
