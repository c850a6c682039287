"""How a consumer warp of a GEMM gets A: prepacked weights from device memory to registers, converted to float16.

The warp reads the order that the GEMV kernels read (`layout/weights.py`): a lane's 16 bytes are its own part of the
fragments, so that weights go straight from global memory to registers. A unit is 128 along K, two K blocks of 64, each
of which is 4 k-steps of 16: 16 registers of A, [k-step, (row g low, row g + 8 low, row g high, row g + 8 high)].

Straight to registers they go with `mma.sync`. With `wgmma` they pass through shared memory (`WeightSource`): in slots
that a lane fills for itself (`ring.py`), or in slots that other warps fill (`weight_copies.py`).
"""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import UNIT
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, TILE_ROWS, PrepackedLayout, make_offsets
from numba_atomflow.ops.cuda.scalars import f32, u32

A_REGISTERS = 16  # of a K block
_SPAN_UNITS = 4  # units that are prefetched together
_ZERO, _ONE = f32(0.0), f32(1.0)


class WeightLoads(NamedTuple):
    """Device functions of a warp's weights. `start`: of its prepacked tile, in words; `unit`: along K.

    Attributes:
        load: (weights, start, unit, block, lane, codes): issue the loads of K block `block` (0 or 1) of a unit to its
            half of `codes`.
        load_scales: (weights, start, unit, lane, scales): of rows g and g + 8.
        convert: (codes, block, a, live_0, live_1): A of a K block. live: whether the scale of row g, g + 8 is not 0;
            a row whose scale is 0 becomes 0.
        prefetch: (weights, start, span): span number `span` of the tile into L2, by one lane.
        span_units: units of a span, except that the tile's last may have fewer: some 8 KB. A bulk prefetch takes
            TMA as long for 1 KB as for 8 KB, and X waits for it.
        code_registers: uint32 of a unit.
    """

    load: Any
    load_scales: Any
    convert: Any
    prefetch: Any
    span_units: int
    code_registers: int


class WeightSource(NamedTuple):
    """How a consumer of the `wgmma` main loop with float16 activations gets the codes of one unit after the other.

    Attributes:
        begin: (io, pipeline, registers): before the first unit, and before the previous kernel has ended.
        read_next: (io, pipeline, registers): wait for the next unit of this CTA's work, and read it to
            `registers.codes`, uint32 [16 for FP8, 32 for float16] in the order of `WeightLoads.load`, and
            `registers.scales`, of rows g and g + 8. After the last unit: anything.
        cursor_words: int32 that it keeps in `registers.cursor`.
        warp_words: of shared memory, from a warp's part to the next warp's; `pipeline.slots` is where a warp's begins.
    """

    begin: Any
    read_next: Any
    cursor_words: int
    warp_words: int


def make_piece_offset(layout: PrepackedLayout) -> Any:
    """Device function (unit, piece) -> word in the prepacked tile at which a piece of a unit begins: 16 bytes of each
    lane. A unit has as many as a weight has bits / 2; `WeightLoads.load` puts piece i into codes 4 i to 4 i + 3.
    """
    codes_at, _ = make_offsets(layout)

    @ptx.device_function
    def fp8_piece(unit, piece):
        return codes_at(unit, piece // 2, piece % 2)

    @ptx.device_function
    def fp16_piece(unit, piece):
        return codes_at(2 * unit + piece // 4, piece // 2 % 2, piece % 2)

    return fp16_piece if layout.format.bits == 16 else fp8_piece


def make_weight_loads(layout: PrepackedLayout) -> WeightLoads:
    """For FP8 or float16 weights in any order of k-tiles."""
    return _make_fp16(layout) if layout.format.bits == 16 else _make_fp8(layout)


def _make_fp8(layout: PrepackedLayout) -> WeightLoads:
    codes_at, scale_at = make_offsets(layout)
    split_rows, to_halves = layout.split_rows, layout.convert

    @ptx.device_function
    def load(weights, start, unit, block, lane, codes):
        for half in range(2):
            w0, w1, w2, w3 = ptx.load_stream_16(weights, start + codes_at(unit, block, half) + lane * 4)
            base = 8 * block + 4 * half
            codes[base], codes[base + 1], codes[base + 2], codes[base + 3] = w0, w1, w2, w3

    @ptx.device_function
    def load_scales(weights, start, unit, lane, scales):
        row = lane >> 2
        if split_rows:
            scales[0] = ptx.load_constant_f32(weights, start + scale_at(unit, row))
            scales[1] = ptx.load_constant_f32(weights, start + scale_at(unit, row + 8))
        else:  # the scales of rows g and g + 8 are neighbours
            scales[0], scales[1] = ptx.load_constant_f32x2(weights, start + scale_at(unit, row))

    @ptx.device_function
    def convert(codes, block, a, live_0, live_1):
        for step in range(4):
            low = codes[8 * block + step] if live_0 else u32(0)
            high = codes[8 * block + 4 + step] if live_1 else u32(0)
            a[4 * step], a[4 * step + 2] = to_halves(low)
            a[4 * step + 1], a[4 * step + 3] = to_halves(high)

    prefetch, span_units = _make_prefetch(layout)
    return WeightLoads(load, load_scales, convert, prefetch, span_units, 16)


def _make_fp16(layout: PrepackedLayout) -> WeightLoads:
    codes_at, _ = make_offsets(layout)

    @ptx.device_function
    def load(weights, start, unit, block, lane, codes):
        for i in range(4):
            at = start + codes_at(2 * unit + block, i // 2, i % 2) + lane * 4
            w0, w1, w2, w3 = ptx.load_stream_16(weights, at)
            base = 16 * block + 4 * i
            codes[base], codes[base + 1], codes[base + 2], codes[base + 3] = w0, w1, w2, w3

    @ptx.device_function
    def load_scales(weights, start, unit, lane, scales):
        # Always 1, but not for the compiler: it would load into the registers of A while `wgmma` is under way, and wait
        # for each before the next (C7513). A selection is an instruction between the two.
        scales[0] = _ONE if len(weights) > 0 else _ZERO
        scales[1] = scales[0]

    @ptx.device_function
    def convert(codes, block, a, live_0, live_1):
        for step in range(4):
            base = 16 * block + step // 2 * 8 + step % 2 * 2
            a[4 * step] = codes[base] if live_0 else u32(0)
            a[4 * step + 2] = codes[base + 1] if live_0 else u32(0)
            a[4 * step + 1] = codes[base + 4] if live_1 else u32(0)
            a[4 * step + 3] = codes[base + 5] if live_1 else u32(0)

    prefetch, span_units = _make_prefetch(layout)
    return WeightLoads(load, load_scales, convert, prefetch, span_units, 32)


def _make_prefetch(layout: PrepackedLayout) -> tuple[Any, int]:
    """`WeightLoads.prefetch` and `span_units`. A span is a k-tile with its scales where the layout has k-tiles."""
    groups, unit_groups = layout.groups, UNIT // layout.group_in_features
    if layout.split_rows:
        words, last_words, last = layout.k_tile_words, layout.last_k_tile_words, layout.k_tiles - 1

        @ptx.device_function
        def prefetch_k_tile(weights, start, span):
            ptx.bulk_prefetch_l2(weights, start + span * words, u32(4 * (words if span < last else last_words)))

        return prefetch_k_tile, layout.k_tile_groups
    span_groups, scales_start, scaled = _SPAN_UNITS * unit_groups, groups * GROUP_WORDS, layout.format.scaled

    @ptx.device_function
    def prefetch_groups(weights, start, span):
        first = span * span_groups
        count = min(span_groups, groups - first)
        ptx.bulk_prefetch_l2(weights, start + first * GROUP_WORDS, u32(count * (4 * GROUP_WORDS)))
        if scaled:
            at = start + scales_start + first * TILE_ROWS
            ptx.bulk_prefetch_l2(weights, at, u32(count * (4 * TILE_ROWS)))

    return prefetch_groups, _SPAN_UNITS
