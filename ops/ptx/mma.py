"""Tensor core instructions. Source of the fragment layouts: PTX ISA 9.0, section 9.7.14."""

from typing import Any

import numpy as np

from numba_atomflow.ops.ptx import simulator
from numba_atomflow.ops.ptx.core import f32, instruction, u32


def _multiply_fragments(lanes: list[Any]) -> tuple[Any, Any]:
    """D = A B + C of one warp, from the fragments of its lanes: rows 0-7 and rows 8-15, float32 [8, 8] each."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane, (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3) in enumerate(lanes):
        row, k = lane >> 2, (lane & 3) * 2
        a[row, k : k + 2], a[row + 8, k : k + 2] = simulator.f16_pair(a0), simulator.f16_pair(a1)
        a[row, k + 8 : k + 10], a[row + 8, k + 8 : k + 10] = simulator.f16_pair(a2), simulator.f16_pair(a3)
        b[k : k + 2, row], b[k + 8 : k + 10, row] = simulator.f16_pair(b0), simulator.f16_pair(b1)
        c[row, k : k + 2], c[row + 8, k : k + 2] = (c0, c1), (c2, c3)
    with np.errstate(invalid="ignore", over="ignore"):
        d = (a @ b + c).astype(np.float32)
    return d[:8], d[8:]


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    (f32,) * 4,
    (u32,) * 6 + (f32,) * 4,
)
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """D = A B + C with A float16 [16, 16], B float16 [16, 8], C and D float32 [16, 8], distributed over a warp.

    Lane 4 g + t holds, as pairs (x, x + 1): A (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); B (k 2t,
    column g), (2t + 8, g); C and D (row g, column 2t), (g + 8, 2t).
    """
    top, bottom = simulator.exchange((a0, a1, a2, a3, b0, b1, c0, c1, c2, c3), _multiply_fragments)
    row, column = simulator.lane_index() >> 2, (simulator.lane_index() & 3) * 2
    return top[row, column], top[row, column + 1], bottom[row, column], bottom[row, column + 1]
