"""Combining partial results of online softmax: each is a running max m, a row sum l and unnormalised outputs."""

from typing import Any

import numpy as np

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.softmax import LOWEST

_ZERO = np.float32(0.0)


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
            at = out_start + (p * rows + row) * head_dim + d
            o0 += rescale * floats[at]
            o1 += rescale * floats[at + 1]
            o2 += rescale * floats[at + 2]
            o3 += rescale * floats[at + 3]
        return new_max, row_sum, o0, o1, o2, o3

    return combine
