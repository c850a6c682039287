"""Split-KV of prefill attention: CTAs share the keys of a tile of queries, where there are fewer tiles than SMs.

That is so for short chunks, and matters if they come late in a long context. Which CTA computes what follows from the
grid, `count` and `position` alone, so that one launch serves all lengths; CTAs without work exit at once.

Every CTA of a split tile writes its unnormalised outputs, maxima and row sums to `partials` in the order of its
registers. The CTA that arrives last (an atomic counter that wraps to zero by itself) adds them in the order of the
splits: the same bits whichever CTA is last.
"""

import math
from typing import Any

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.attention.prefill_softmax import MASKED
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_LEAST_BLOCKS = 4  # of a split: with fewer, combining would take longer than it saves
_BARRIER = 3  # the named barrier of the threads that compute
_ZERO = f32(0.0)


def make_find_work(plan: PrefillAttentionPlan) -> Any:
    """Device function (cta, ctas, position, count) -> (tile, head, split, counter, active, block, end).

    The CTA computes query tile `tile`, tiles of late tokens first, over key blocks `block` down to `end`. It is split
    `split` of `active` that have work; `counter`: index of the arrival counter they share. tile is negative if the CTA
    has no work.
    """
    heads, query_tile, key_block, sms = plan.heads, plan.query_tile, plan.key_block, plan.sms
    window = plan.window

    @ptx.device_function
    def divide(a, b):
        """a // b of numbers that are not negative, in 32 bits: in 64 bits it would be a call."""
        return i32(u32(a) // u32(b))

    @ptx.device_function
    def first_block(position, tile):
        """The first block with a key that the tile's first token sees."""
        return divide(max(0, position + tile * query_tile + 1 - window), key_block) if window > 0 else 0

    @ptx.device_function
    def find_work(cta, ctas, position, count):
        tiles = divide(count + query_tile - 1, query_tile)
        splits = max(1, divide(min(ctas, sms), max(1, heads * tiles)))
        counter = divide(cta, splits)
        split, late_tiles = cta - counter * splits, divide(counter, heads)
        head, tile = counter - late_tiles * heads, tiles - 1 - late_tiles
        keys = max(0, min(position + (tile + 1) * query_tile, position + count))
        begin = first_block(position, tile)
        blocks = divide(keys + key_block - 1, key_block) - begin
        share = max(_LEAST_BLOCKS, divide(blocks + splits - 1, splits))
        active = divide(blocks + share - 1, share)
        block = begin + blocks - 1 - split * share
        end = max(begin, block - share + 1)
        if split >= active or count < 1:
            tile = -1
        return tile, head, split, counter, active, block, end

    @ptx.device_function
    def find_whole(cta, ctas, position, count):
        head, tile = cta % heads, (count + query_tile - 1) // query_tile - 1 - cta // heads
        block = (min(position + (tile + 1) * query_tile, position + count) - 1) // key_block
        return tile, head, 0, 0, 1, block, first_block(position, tile)

    return find_work if sms > 1 else find_whole


def make_combine_splits(plan: PrefillAttentionPlan) -> Any:
    """Device function (io, words, o, maxima, row_sums, first_cta, split, active, counter, thread) -> whether this CTA
    was the last of its tile: o and row_sums are then those of all splits.

    Arguments: words, shared memory as uint32; first_cta, of the tile; counter, index of the tile's counter; thread, of
    those that compute.
    """
    consumers, vectors, cta_floats = plan.consumer_warps * 32, plan.out_registers // 4, plan.cta_partials
    flag = plan.shared_bytes // 4 - 4
    scale = f32(math.log2(math.e) / math.sqrt(plan.head_dim))

    @ptx.device_function
    def combine_splits(io, words, o, maxima, row_sums, first_cta, split, active, counter, thread):
        start = (first_cta + split) * cta_floats + thread * 4
        for j in range(vectors):
            i = 4 * j
            ptx.store_f32x4(io.partials, start + j * 4 * consumers, o[i], o[i + 1], o[i + 2], o[i + 3])
        stats = start + vectors * 4 * consumers
        ptx.store_f32x4(io.partials, stats, maxima[0], maxima[1], row_sums[0], row_sums[1])
        # All threads wrote, then passed the barrier; one fences for them (fences are cumulative) and counts the CTA.
        # Who counts last fences again before all read.
        ptx.named_barrier_sync(u32(_BARRIER), u32(consumers))
        if thread == 0:
            ptx.fence_gpu()
            words[flag] = cuda.atomic.inc(io.counters, counter, u32(active - 1))
            ptx.fence_gpu()
        ptx.named_barrier_sync(u32(_BARRIER), u32(consumers))
        if words[flag] != active - 1:
            return False
        start = first_cta * cta_floats + thread * 4
        stats = start + vectors * 4 * consumers
        max_0, max_1, sum_0, sum_1 = MASKED, MASKED, _ZERO, _ZERO
        for s in range(active):
            m_0, m_1, _, _ = ptx.load_relaxed_f32x4(io.partials, stats + s * cta_floats)
            max_0, max_1 = ptx.max_f32(max_0, m_0), ptx.max_f32(max_1, m_1)
        for i in range(4 * vectors):
            o[i] = _ZERO
        for s in range(active):
            m_0, m_1, l_0, l_1 = ptx.load_relaxed_f32x4(io.partials, stats + s * cta_floats)
            rescale_0, rescale_1 = ptx.exp2((m_0 - max_0) * scale), ptx.exp2((m_1 - max_1) * scale)
            sum_0, sum_1 = ptx.fma(l_0, rescale_0, sum_0), ptx.fma(l_1, rescale_1, sum_1)
            for i in range(vectors):
                index = start + s * cta_floats + i * 4 * consumers
                x_0, x_1, x_2, x_3 = ptx.load_relaxed_f32x4(io.partials, index)
                o[4 * i], o[4 * i + 1] = ptx.fma(x_0, rescale_0, o[4 * i]), ptx.fma(x_1, rescale_0, o[4 * i + 1])
                o[4 * i + 2] = ptx.fma(x_2, rescale_1, o[4 * i + 2])
                o[4 * i + 3] = ptx.fma(x_3, rescale_1, o[4 * i + 3])
        row_sums[0], row_sums[1] = sum_0, sum_1
        return True

    return combine_splits
