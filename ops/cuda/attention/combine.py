"""Combining partial results of online softmax: each is a running max m, a row sum l and unnormalised outputs."""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.softmax import LOWEST
from numba_atomflow.ops.cuda.scalars import f32

LOADS_IN_FLIGHT = 8  # partial results that a thread of `combine_splits` loads before it uses the first
_ZERO = f32(0.0)


def make_combine(head_dim: int, rows: int, out_start: int, stats_start: int) -> Any:
    """Device function (floats, partials, row, d) -> (m, l, o0, o1, o2, o3) of a row over `partials` partial results,
    with the unnormalised outputs of elements d .. d + 3.

    Partial results lie in shared memory, float32: outputs [partials, rows, head_dim] from `out_start`, (m, l)
    [partials, rows, 2] from `stats_start`.
    """

    @ptx.device_function
    def combine(floats, partials, row, d):
        new_max, row_sum = LOWEST, _ZERO
        o0, o1, o2, o3 = _ZERO, _ZERO, _ZERO, _ZERO
        for p in range(partials):
            new_max = max(new_max, floats[stats_start + (p * rows + row) * 2])
        for p in range(partials):
            rescale = ptx.exp2(floats[stats_start + (p * rows + row) * 2] - new_max)
            row_sum += rescale * floats[stats_start + (p * rows + row) * 2 + 1]
            index = out_start + (p * rows + row) * head_dim + d
            o0 += rescale * floats[index]
            o1 += rescale * floats[index + 1]
            o2 += rescale * floats[index + 2]
            o3 += rescale * floats[index + 3]
        return new_max, row_sum, o0, o1, o2, o3

    return combine


def make_combine_splits(head_dim: int, rows: int, stats_start: int) -> Any:
    """Device function (partials, floats, loaded, first_cta, kv_splits, row, d) -> (l, o0, o1, o2, o3) of a row over the
    KV splits of CTAs first_cta .. first_cta + kv_splits - 1, as `combine` returns them.

    Arguments: partials float32 in global memory, written by other CTAs: outputs [ctas, rows, head_dim]; floats, shared
    memory with (m, l) [kv_splits, rows, 2] from `stats_start`; loaded, scratch float32 [4 * LOADS_IN_FLIGHT].
    """

    @ptx.device_function
    def combine_splits(partials, floats, loaded, first_cta, kv_splits, row, d):
        new_max, row_sum = LOWEST, _ZERO
        for s in range(kv_splits):
            new_max = max(new_max, floats[stats_start + (s * rows + row) * 2])
        for s in range(kv_splits):
            row_sum += (
                ptx.exp2(floats[stats_start + (s * rows + row) * 2] - new_max)
                * floats[stats_start + (s * rows + row) * 2 + 1]
            )
        o0, o1, o2, o3 = _ZERO, _ZERO, _ZERO, _ZERO
        s = 0
        while s < kv_splits:
            for i in range(LOADS_IN_FLIGHT):
                index = ((first_cta + min(s + i, kv_splits - 1)) * rows + row) * head_dim + d
                x0, x1, x2, x3 = ptx.load_relaxed_f32x4(partials, index)
                loaded[4 * i], loaded[4 * i + 1], loaded[4 * i + 2], loaded[4 * i + 3] = x0, x1, x2, x3
            for i in range(LOADS_IN_FLIGHT):
                if s + i < kv_splits:
                    rescale = ptx.exp2(floats[stats_start + ((s + i) * rows + row) * 2] - new_max)
                    o0 += rescale * loaded[4 * i]
                    o1 += rescale * loaded[4 * i + 1]
                    o2 += rescale * loaded[4 * i + 2]
                    o3 += rescale * loaded[4 * i + 3]
            s += LOADS_IN_FLIGHT
        return row_sum, o0, o1, o2, o3

    return combine_splits
