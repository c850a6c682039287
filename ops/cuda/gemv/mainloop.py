"""The main loop of a GEMV: prepacked weights from device memory to registers, converted, multiplied on tensor cores.

`mma.m16n8k16` multiplies 16 weight rows (A, converted from FP8 in registers) by up to 8 tokens (B, from shared memory);
the weights are read once for any number of tokens. Products of float16 are exact in float32; sums are
float32; a group's scale multiplies its sum of 128 products; float16 weights need neither conversion nor scales. The
order of the weights: `layout/weights.py`.

A lane's registers: `codes` uint32 [groups in flight, 16]; `scales` float32 [groups in flight, 2] for rows g and g + 8;
`sums` float32 [4] for rows g (0, 1) and g + 8 (2, 3), tokens 2 t and 2 t + 1, where lane = 4 g + t.
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan
from numba_atomflow.ops.cuda.layout.weights import make_offsets
from numba_atomflow.ops.cuda.scalars import f32

_ZERO, _ONE = f32(0.0), f32(1.0)


def make_load(plan: GemvPlan) -> Any:
    """Device function (weights, tile, batch, k_slice, lane, codes, scales): issue the loads of one batch of groups.

    `k_slice`: which of the `split_k` warps of the tile this is: it takes every `split_k`-th group.
    """
    layout, split_k, in_flight, uniform = plan.layout, plan.split_k, plan.groups_in_flight, plan.uniform
    groups, tile_words = layout.groups, layout.tile_words
    fp16, split_rows = layout.format.bits == 16, layout.split_rows
    codes_at, scale_at = make_offsets(layout)

    @ptx.device_function
    def load(weights, tile, batch, k_slice, lane, codes, scales):
        for u in range(in_flight):
            group = k_slice + (batch * in_flight + u) * split_k
            if uniform or group < groups:
                if not fp16:
                    start = tile * tile_words + scale_at(group, lane >> 2)
                    if split_rows:
                        scales[2 * u] = ptx.load_constant_f32(weights, start)
                        start = tile * tile_words + scale_at(group, (lane >> 2) + 8)
                        scales[2 * u + 1] = ptx.load_constant_f32(weights, start)
                    else:  # the scales of rows g and g + 8 are neighbours
                        scales[2 * u], scales[2 * u + 1] = ptx.load_constant_f32x2(weights, start)
                for i in range(4):
                    start = tile * tile_words + codes_at(group, i // 2, i % 2) + lane * 4
                    w0, w1, w2, w3 = ptx.load_stream_16(weights, start)
                    base = 16 * u + 4 * i
                    codes[base], codes[base + 1], codes[base + 2], codes[base + 3] = w0, w1, w2, w3

    return load


def make_multiply(plan: GemvPlan) -> Any:
    """Device function (batch, k_slice, lane, codes, scales, words, sums): sums += the batch's part of W x.

    `words`: shared memory, x first. Lanes of tokens beyond the last one repeat it; their sums are discarded.
    """
    layout, split_k, in_flight, uniform = plan.layout, plan.split_k, plan.groups_in_flight, plan.uniform
    groups, fp16 = layout.groups, layout.format.bits == 16
    tokens, x_pitch, x_step = plan.tokens, plan.x_pitch, layout.group_in_features // 2  # words of x per group
    convert = layout.convert

    @ptx.device_function
    def multiply(batch, k_slice, lane, codes, scales, words, sums):
        x_row = min(lane >> 2, tokens - 1) * x_pitch + (lane & 3) * (4 if fp16 else 8)
        for u in range(in_flight):
            group = k_slice + (batch * in_flight + u) * split_k
            if uniform or group < groups:
                c0, c1, c2, c3 = _ZERO, _ZERO, _ZERO, _ZERO
                for s in range(2):
                    base = 16 * u + 8 * s
                    if fp16:
                        b0, b1, b2, b3 = ptx.load_shared_16(words, x_row + group * x_step + s * 16)
                        a0, a1, a2, a3 = codes[base], codes[base + 4], codes[base + 1], codes[base + 5]
                        c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        a0, a1, a2, a3 = codes[base + 2], codes[base + 6], codes[base + 3], codes[base + 7]
                        c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, c0, c1, c2, c3)
                    else:
                        for h in range(2):
                            b0, b1, b2, b3 = ptx.load_shared_16(words, x_row + group * x_step + s * 32 + h * 4)
                            low_0, low_1 = convert(codes[base + 2 * h])
                            high_0, high_1 = convert(codes[base + 4 + 2 * h])
                            c0, c1, c2, c3 = ptx.mma(low_0, high_0, low_1, high_1, b0, b1, c0, c1, c2, c3)
                            low_0, low_1 = convert(codes[base + 2 * h + 1])
                            high_0, high_1 = convert(codes[base + 5 + 2 * h])
                            c0, c1, c2, c3 = ptx.mma(low_0, high_0, low_1, high_1, b2, b3, c0, c1, c2, c3)
                low_scale = _ONE if fp16 else scales[2 * u]
                high_scale = _ONE if fp16 else scales[2 * u + 1]
                sums[0] += c0 * low_scale
                sums[1] += c1 * low_scale
                sums[2] += c2 * high_scale
                sums[3] += c3 * high_scale

    return multiply
