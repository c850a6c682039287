"""Projections on tensor cores: y = W x for 1 to 8 columns of x, with what comes before and after fused in.

`mma.m16n8k16` multiplies 16 weight rows (A, decoded from FP8 in registers) with up to 8 columns of x (B); the weights
pass through once, whatever the number of columns. Products of float16 are exact in float32; sums are float32; a
group's scale multiplies its sum of 128 products; float16 weights need neither decoding nor scales. See `fragments.py`
for the order of the weights.

How a block works: `split` of its warps share a tile of 16 rows, each taking every `split`-th group of 128 columns;
their sums meet in shared memory and are added in a fixed order, so that the result is the same in every run. Blocks
walk over the tiles with a stride of the grid. The next loads of weights are always issued before the work that waits
for something else: before the prologue (x is staged while the first weights are on their way), and before the sums of
a tile are added.

Prologues: copy x (float16) into shared memory; or norm: RMSNorm of the float32 residual into float16 there.
Epilogues: store float32; add to the residual; SwiGLU; or RoPE, q and the KV cache. The latter two want paired rows.

Cost model: N * K * (1 + 1 / 32) bytes. At 4.66 TB/s, and with the 2.5-4 us that every kernel costs beyond its bytes:

==========================  =======  ==========  ==============
Llama 3.2 3B                   MB     us (bytes)  us (kernel)
==========================  =======  ==========  ==============
qkv        5120 x 3072         16.2     3.5         6-7.5
o          3072 x 3072          9.7     2.1         4.6-6
gate_up   16384 x 3072         51.9    11.1         13.6-15
down       3072 x 8192         26.0     5.6         8-9.6
vocabulary 128256 x 3072      406.3    87.2         90-91
==========================  =======  ==========  ==============
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import FragmentLayout, make_places

LOG2_E = np.float32(math.log2(math.e))
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_SCALED_AT_ONCE = 4  # loads of x (and of the norm) that the compiler may gather: more would spill the first weights

Prologue = Literal["copy", "norm"]


@ptx.device_function
def gated(gate, up):
    """silu(gate) * up."""
    sigmoid = _ONE / (_ONE + ptx.exp2(-gate * LOG2_E))
    return gate * sigmoid * up


@ptx.device_function
def rotated(low, high, cosine, sine):
    """The two elements of a head that RoPE rotates together, rotated."""
    return low * cosine - high * sine, high * cosine + low * sine


@dataclass(frozen=True)
class ProjectionShape:
    """How the work is cut.

    Attributes:
        columns: of x, 1 to 8.
        warps: per block.
        split: warps that share a tile: 1, 2, 4 ... up to `warps`.
        depth: groups of 128 columns whose weights a warp has in flight: 2 KB each.
        resident: blocks per multiprocessor: with 8 warps and 4 KB of weights each, two have 64 KB in flight.
    """

    layout: FragmentLayout
    columns: int = 1
    warps: int = 8
    split: int = 8
    depth: int = 2
    resident: int = 2

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def x_pitch(self) -> int:
        """Words from one column of x to the next in shared memory: 4 more than a multiple of 64, for the banks."""
        return self.layout.padded_columns // 2 + 4

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: x, two sets of partial sums, and the warps' sums of squares."""
        partials = 2 * self.warps * 16 * self.columns
        return 4 * (self.columns * self.x_pitch + partials + self.warps * self.columns)

    def blocks(self, sms: int) -> int:
        """Blocks of a launch: one wave at most."""
        needed = -(-self.layout.tiles // (self.warps // self.split))
        return min(needed, sms * self.resident)


def choose_shape(layout: FragmentLayout, columns: int, sms: int) -> ProjectionShape:
    """How to cut a projection: measured on an H100 at Llama 3.2 3B's shapes (docs/cuda-backend.md).

    The least splitting that still makes four blocks of 8 warps per multiprocessor, and no more than there are groups. A
    warp's share of a tile is loaded at once if that is three groups at most. One block of 16 warps stages x once where
    two of 8 would do it twice: with one column that pays from two tiles per multiprocessor on; with more, when there is
    a tile for each.
    """
    split = 1
    while split < 8 and 2 * split <= layout.groups and layout.tiles * split < 8 * 4 * sms:
        split *= 2
    share = -(-layout.groups // split)
    at_once = share if share <= 3 else 2
    if columns > 1:
        # Before sm_89 FP8 is decoded bit by bit, which leaves registers for one group.
        depth = at_once if layout.hardware_fp8 else 1
        if layout.tiles >= sms:
            return ProjectionShape(layout, columns, warps=16, split=split, depth=depth, resident=1)
        return ProjectionShape(layout, columns, split=split, depth=depth)
    if split == 1:
        return ProjectionShape(layout, split=split)
    if layout.tiles >= 2 * sms:
        return ProjectionShape(layout, warps=16, split=split, depth=at_once, resident=1)
    deep = 4 if layout.hardware_fp8 else 2
    return ProjectionShape(layout, split=split, depth=share if share <= 3 else deep)


@ptx.device_function
def nothing_ahead(outputs, thread):
    """What an epilogue reads was written in this step."""


def make_runner(
    shape: ProjectionShape, prologue: Prologue, eps: float, dependent: bool, epilogue: Any, ahead: Any = nothing_ahead
) -> Any:
    """Device function (weights, source, norm, normed, outputs): everything but the epilogue's own work.

    Args:
        prologue: "copy": source is float16 [columns, padded K] as uint32 words, its padding finite, `norm` is not
            read. "norm": source is the float32 residual [columns, K] as uint32 words, norm float32 [K]; K is even.
            The last blocks also write what they made to normed, a column each, pairs of float16 [columns, padded K],
            behind loads that are on their way anyway: so a validator sees the inside of the running kernel.
        eps: of the norm.
        dependent: launched with programmatic dependent launch (sm_90 and later).
        epilogue: device function (outputs, tile, r, column, low, high) for the finished rows r and r + 8 of a tile.
        ahead: device function (outputs, thread) that may `ptx.prefetch` what the epilogue will read and no
            kernel of this step writes.
    """
    layout, columns = shape.layout, shape.columns
    warps, split, depth, threads = shape.warps, shape.split, shape.depth, shape.threads
    slots = warps // split
    width, groups, tiles, tile_words = layout.columns, layout.groups, layout.tiles, layout.tile_words
    share = -(-groups // split)
    batches = -(-share // depth)
    halves, x_step = layout.halves, layout.group_columns // 2  # words of x per group
    apart = layout.halves_apart
    even = groups == batches * depth * split  # then every warp has the same work, and nothing is tested
    x_pitch, x_words = shape.x_pitch, layout.padded_columns // 2
    words_per_thread = -(-x_words // threads)
    # The prologue gives every column to a team of threads; with fewer warps than columns, teams take turns.
    team = 32 * max(1, warps // columns)
    teams = threads // team
    turns = -(-columns // teams)
    all_work = columns * team == turns * threads
    copy_vectors = -(-x_words // (4 * team))
    copy_whole = x_words == copy_vectors * 4 * team
    vector = 4 if width % 4 == 0 else 2
    norm_vectors = -(-2 * x_words // (vector * team))
    norm_lines = -(-width // (32 * threads))  # lines of 128 bytes, per thread
    norm_whole = width == norm_vectors * vector * team
    partials_start = columns * x_pitch
    buffer_size = warps * 16 * columns
    squares_start = partials_start + 2 * buffer_size
    code_registers, scale_registers = 16 * depth, 2 * depth
    pairs_per_slot, slot_threads = 8 * columns, split * 32
    inverse_width, epsilon = np.float32(1.0 / width), np.float32(eps)
    decode = layout.decode
    codes_at, scale_at = make_places(layout)

    @ptx.device_function
    def load(weights, tile, batch, part, lane, codes, scales):
        """Issue the loads of one batch."""
        for u in range(depth):
            group = part + (batch * depth + u) * split
            if even or group < groups:
                if not halves:
                    start = tile * tile_words + scale_at(group, lane >> 2)
                    if apart:
                        scales[2 * u] = ptx.load_constant_f32(weights, start)
                        start = tile * tile_words + scale_at(group, (lane >> 2) + 8)
                        scales[2 * u + 1] = ptx.load_constant_f32(weights, start)
                    else:  # both stand side by side
                        scales[2 * u], scales[2 * u + 1] = ptx.load_constant_f32x2(weights, start)
                for i in range(4):
                    start = tile * tile_words + codes_at(group, i // 2, i % 2) + lane * 4
                    w0, w1, w2, w3 = ptx.load_stream_16(weights, start)
                    at = 16 * u + 4 * i
                    codes[at], codes[at + 1], codes[at + 2], codes[at + 3] = w0, w1, w2, w3

    @ptx.device_function
    def multiply(batch, part, lane, codes, scales, words, total):
        """total += the batch's share of W x: rows g (0, 1) and g + 8 (2, 3), columns 2 t and 2 t + 1."""
        x_row = min(lane >> 2, columns - 1) * x_pitch + (lane & 3) * (4 if halves else 8)
        for u in range(depth):
            group = part + (batch * depth + u) * split
            if even or group < groups:
                c0, c1, c2, c3 = _ZERO, _ZERO, _ZERO, _ZERO
                for s in range(2):
                    at = 16 * u + 8 * s
                    if halves:
                        b0, b1, b2, b3 = ptx.load_block_16(words, x_row + group * x_step + s * 16)
                        a0, a1, a2, a3 = codes[at], codes[at + 4], codes[at + 1], codes[at + 5]
                        c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        a0, a1, a2, a3 = codes[at + 2], codes[at + 6], codes[at + 3], codes[at + 7]
                        c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, c0, c1, c2, c3)
                    else:
                        for h in range(2):
                            b0, b1, b2, b3 = ptx.load_block_16(words, x_row + group * x_step + s * 32 + h * 4)
                            low_0, low_1 = decode(codes[at + 2 * h])
                            high_0, high_1 = decode(codes[at + 4 + 2 * h])
                            c0, c1, c2, c3 = ptx.mma(low_0, high_0, low_1, high_1, b0, b1, c0, c1, c2, c3)
                            low_0, low_1 = decode(codes[at + 2 * h + 1])
                            high_0, high_1 = decode(codes[at + 5 + 2 * h])
                            c0, c1, c2, c3 = ptx.mma(low_0, high_0, low_1, high_1, b2, b3, c0, c1, c2, c3)
                low_scale = _ONE if halves else scales[2 * u]
                high_scale = _ONE if halves else scales[2 * u + 1]
                total[0] += c0 * low_scale
                total[1] += c1 * low_scale
                total[2] += c2 * high_scale
                total[3] += c3 * high_scale

    @ptx.device_function
    def announce(norm, thread):
        """The norm was last read a step ago: bring it out of memory while the kernel before still runs."""
        for i in range(norm_lines):
            at = (i * threads + thread) * 32
            if at < width:
                ptx.prefetch(norm, at)

    @ptx.device_function
    def copy(source, thread, words):
        """Every column by its team."""
        member = thread % team
        for turn in range(turns):
            column = turn * teams + thread // team
            if all_work or column < columns:
                for i in range(copy_vectors):
                    word = (i * team + member) * 4
                    if copy_whole or word < x_words:
                        a, b, c, d = ptx.load_16(source, column * x_words + word)
                        ptx.store_block_16(words, column * x_pitch + word, a, b, c, d)

    @ptx.device_function
    def normalise_one(source, norm, thread, words, floats):
        """The only column, by all threads."""
        squares = _ZERO
        for i in range(words_per_thread):
            pair = i * threads + thread
            if 2 * pair < width:
                a, b = ptx.load_8(source, 2 * pair)
                low, high = ptx.bits_f32(a), ptx.bits_f32(b)
                squares += low * low + high * high
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            floats[squares_start + (thread >> 5)] = squares
        cuda.syncthreads()
        squares = _ZERO
        for warp in range(warps):
            squares += floats[squares_start + warp]
        factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
        for i in range(words_per_thread):
            pair = i * threads + thread
            if 2 * pair < width:
                a, b = ptx.load_8(source, 2 * pair)
                low = ptx.bits_f32(a) * factor * norm[2 * pair]
                high = ptx.bits_f32(b) * factor * norm[2 * pair + 1]
                words[pair] = ptx.pack_f16x2(low, high)
            elif pair < x_words:
                words[pair] = np.uint32(0)

    @ptx.device_function
    def sum_squares(source, column, member):
        """A thread's share of a column's sum of squares."""
        squares = _ZERO
        for i in range(norm_vectors):
            at = (i * team + member) * vector
            if norm_whole or at < width:
                if vector == 4:
                    a, b, c, d = ptx.load_f32x4(source, column * width + at)
                    squares += a * a + b * b + (c * c + d * d)
                else:
                    a, b = ptx.load_f32x2(source, column * width + at)
                    squares += a * a + b * b
        return squares

    @ptx.device_function
    def scale(source, norm, column, member, works, factor, words):
        """A thread's share of a column times factor and norm, as float16 into shared memory, padding included."""
        for i in range(norm_vectors):
            if i > 0 and i % _SCALED_AT_ONCE == 0:
                ptx.sync_warp()
            at = (i * team + member) * vector
            word = column * x_pitch + at // 2
            if (all_work or works) and (norm_whole or at < width):
                if vector == 4:
                    a, b, c, d = ptx.load_f32x4(source, column * width + at)
                    e, f, g, h = ptx.load_f32x4(norm, at)
                    low = ptx.pack_f16x2(a * factor * e, b * factor * f)
                    high = ptx.pack_f16x2(c * factor * g, d * factor * h)
                    ptx.store_block_8(words, word, low, high)
                else:
                    a, b = ptx.load_f32x2(source, column * width + at)
                    e, f = ptx.load_f32x2(norm, at)
                    words[word] = ptx.pack_f16x2(a * factor * e, b * factor * f)
            elif (all_work or works) and not norm_whole and at < 2 * x_words:
                for j in range(vector // 2):
                    words[word + j] = np.uint32(0)

    @ptx.device_function
    def normalise_columns(source, norm, thread, words, floats):
        """Every column by its team, one reduction each. The second reading comes out of the first-level cache."""
        member = thread % team
        for turn in range(turns):
            column = turn * teams + thread // team
            works = all_work or column < columns
            squares = sum_squares(source, column, member) if works else _ZERO
            squares = ptx.warp_sum(squares)
            if team > 32:  # then there is but one turn
                if thread & 31 == 0:
                    floats[squares_start + (thread >> 5)] = squares
                cuda.syncthreads()
                squares = _ZERO
                for i in range(team // 32):
                    squares += floats[squares_start + thread // team * (team // 32) + i]
            # Not 1 / sqrt: the exact ones are subroutines, around which weights in flight would be spilled.
            factor = ptx.reciprocal_root(squares * inverse_width + epsilon)
            scale(source, norm, column, member, works, factor, words)

    normalise = normalise_one if columns == 1 else normalise_columns

    @ptx.device_function
    def report(normed, thread, words):
        """What was staged, a column from each of the last blocks: none of them is held up by all columns."""
        for column in range(columns):
            if cuda.blockIdx.x == max(cuda.gridDim.x - 1 - column, 0):
                for i in range(words_per_thread):
                    pair = i * threads + thread
                    if 2 * pair < width:
                        normed[column * x_words + pair] = words[column * x_pitch + pair]

    @ptx.device_function
    def run(weights, source, norm, normed, outputs):
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        codes = cuda.local.array(code_registers, uint32)
        scales = cuda.local.array(scale_registers, float32)
        total = cuda.local.array(4, float32)
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        slot, part = warp // split, warp % split
        first = cuda.blockIdx.x * slots
        tile = min(first + slot, tiles - 1)  # a slot without a tile repeats the last one, and drops the result
        load(weights, tile, 0, part, lane, codes, scales)
        if prologue == "norm":
            announce(norm, thread)
        if dependent:
            ptx.let_next_kernel_start()
            ahead(outputs, thread)
            ptx.wait_for_previous_kernel()
        if prologue == "norm":
            normalise(source, norm, thread, words, floats)
        else:
            copy(source, thread, words)
        cuda.syncthreads()
        if prologue == "norm":
            report(normed, thread, words)
        parity = 0
        while first < tiles:
            live = first + slot < tiles
            following = first + cuda.gridDim.x * slots
            next_tile = min(following + slot, tiles - 1)
            for i in range(4):
                total[i] = _ZERO
            for batch in range(batches):
                multiply(batch, part, lane, codes, scales, words, total)
                last = batch == batches - 1
                if not last or following < tiles:
                    load(weights, next_tile if last else tile, 0 if last else batch + 1, part, lane, codes, scales)

            # Two sets of partial sums take turns: one barrier per tile is enough.
            sums = partials_start + parity * buffer_size
            own = sums + warp * 16 * columns + (lane >> 2) * columns
            for i in range(2):
                column = (lane & 3) * 2 + i
                if column < columns:
                    floats[own + column] = total[i]
                    floats[own + 8 * columns + column] = total[2 + i]
            if split == 1:
                ptx.sync_warp()
            else:
                cuda.syncthreads()
            entry = part * 32 + lane
            while entry < pairs_per_slot and live:
                low, high = _ZERO, _ZERO
                for other in range(split):
                    at = sums + (slot * split + other) * 16 * columns + entry
                    low += floats[at]
                    high += floats[at + 8 * columns]
                epilogue(outputs, tile, entry // columns, entry % columns, low, high)
                entry += slot_threads
            parity ^= 1
            tile = next_tile
            first = following

    return run
