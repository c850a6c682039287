"""Grouped-query attention of 1 to 8 tokens over a float16 KV cache: split-KV (Flash-Decoding) on tensor cores.

A CTA computes one KV head, up to 16 of the queries that share it (a query is a token and a head), and one KV split.
Its warps take steps of 16 keys in turn: scores Q K^T and outputs P V are `mma.m16n8k16`, softmax is the online one in
float32 (softmax.py). fragments.py says how 16-byte loads of Q, K and V become operands of mma.

Partial results of the warps, then of the KV splits, are combined in a fixed order (combine.py). The CTA that finishes
last for its KV head and queries (an atomic counter that wraps to zero by itself) combines the KV splits: no second
kernel, and the same bits whichever CTA is last. The length of a KV split follows from the length of the sequence alone,
which is read from device memory: the launch is the same at every length, and CTAs without keys exit at once.

A sliding window of W positions moves the beginning: KV splits share the keys from the first one that the first token
of the step sees, and of these each query's mask leaves its own W. A warp may so meet only masked keys: its weights are
those of `LOWEST`, and combining gives them none.

Keys beyond the last token are never loaded (the last valid key is loaded in their place, and masked): what the cache
holds there changes no bit.

Cost model: 4 * length * kv_heads * head_dim bytes. Llama 3.2 3B (8 KV heads of 128): at 4,096 positions 16.8 MB, 3.6 us
at 4.66 TB/s, predicted 7-9 us with launch, ramp and combining; at 16,384 67 MB, 14.4 us, predicted 18-22 us. Below
1,000 positions latency dominates: 4-5 us.
"""

import math
from dataclasses import dataclass
from typing import Any

from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import LOADS_IN_FLIGHT, make_combine, make_combine_splits
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.elementwise import make_soft_cap
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

KEYS = 16  # per step of a warp
_UNSPLIT_STEPS = 2  # of a CTA: a sequence of no more is not split, as combining would take longer
_ZERO = f32(0.0)


@dataclass(frozen=True)
class KvAddressing:
    """Where the keys and values of a sequence lie in the KV cache. All functions are device functions, and `io` is the
    kernel's parameter.

    Attributes:
        batch: tokens of a launch, each of any sequence and with the CTAs of an `AttentionShape` of one token. 0: a
            launch computes one sequence.
        same_page: the keys of a step are always in one page.
        sequence_start: (io, sequence) -> int32: first entry of the sequence in the block table, or first row in the
            cache.
        find_page: (io, sequence_start, key) -> what `row_of` needs of the page that position `key` lies in.
        row_of: (page, key) -> row of the key and value in the cache.
        position: (io, sequence) -> position of the sequence's first token in this step.
        cached: (io, sequence) -> positions that were in the cache before this step.
    """

    batch: int
    same_page: bool
    sequence_start: Any
    find_page: Any
    row_of: Any
    position: Any
    cached: Any


def make_attend(shape: AttentionShape, addressing: KvAddressing, dependent: bool) -> Any:
    """Device function (io): what one CTA computes. `io` has the fields of `AttentionArguments`, and those that the
    functions of `addressing` read.
    """
    window, soft_cap = shape.window, shape.soft_cap
    head_dim, kv_heads, gqa_ratio = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
    value_parts, value_dim, query_tiles = shape.value_parts, shape.value_dim, shape.query_tiles
    tokens, queries, rows, kv_splits = shape.tokens, shape.queries, shape.rows, shape.kv_splits
    warps, threads, work_tiles = shape.warps, shape.threads, shape.work_tiles
    q_row, kv_row, out_row = shape.heads * head_dim // 2, kv_heads * head_dim // 2, shape.out_width // 2
    head_words, value_words = head_dim // 2, value_dim // 2
    fragments, value_fragments = make_head_fragments(head_dim), make_head_fragments(value_dim)
    row_registers, value_registers = fragments.row_registers, value_fragments.value_registers
    load_row, load_value, element = fragments.load_row, value_fragments.load_value, value_fragments.element
    k_registers, v_registers, out_registers = 2 * row_registers, 4 * value_registers, value_dim // 2
    load_registers = 4 * LOADS_IN_FLIGHT
    step_keys = KEYS * warps
    vectors = rows * value_dim // 4  # of four elements
    out_start = shape.q_words
    stats_start = out_start + warps * rows * value_dim
    flag_index = shape.shared_bytes // 4 - 1
    batched, same_page = addressing.batch > 0, addressing.same_page
    position_of, cached = addressing.position, addressing.cached
    sequence_start_of, find_page, row_of = addressing.sequence_start, addressing.find_page, addressing.row_of
    stats_global = max(addressing.batch, 1) * shape.ctas * rows * value_dim
    softmax_step = make_softmax_step(value_registers, half_tile=False)
    combine_warps = make_combine(value_dim, rows, out_start, stats_start)
    combine_splits = make_combine_splits(value_dim, rows, out_start)
    scale = f32(math.log2(math.e) / math.sqrt(head_dim))
    capped = make_soft_cap(soft_cap or 1.0, 1.0 / math.sqrt(head_dim), math.log2(math.e))

    @ptx.device_function
    def part_start(work_tile):
        """Word of a head at which the outputs of a work tile begin."""
        return work_tile // (kv_heads * query_tiles) * value_words if value_parts > 1 else 0

    @ptx.device_function
    def load_step(io, sequence_start, base, length, kv, work_tile, g, t, k_regs, v_regs):
        """A lane's part of the keys and values of one step."""
        page_0 = find_page(io, sequence_start, base)
        # The last key is loaded for those beyond it: if the step's second half has no keys, it is in the first half.
        page_1 = page_0 if same_page else find_page(io, sequence_start, min(base + 8, length - 1))
        for h in range(2):
            key = min(base + h * 8 + g, length - 1)
            row = row_of(page_0 if h == 0 else page_1, key)
            load_row(io.keys, row * kv_row + kv * head_words, t, k_regs, h * row_registers)
        for i in range(4):
            key = min(base + 2 * t + i % 2 + i // 2 * 8, length - 1)
            row = row_of(page_0 if i // 2 == 0 else page_1, key)
            start = row * kv_row + kv * head_words + part_start(work_tile)
            load_value(io.values, start, g, v_regs, i * value_registers)

    @ptx.device_function
    def store_out(out, sequence, query, kv, work_tile, d, o0, o1, o2, o3):
        """Four elements of a query's output."""
        start = (sequence + query // gqa_ratio) * out_row + (kv * gqa_ratio + query % gqa_ratio) * head_words + d // 2
        start += part_start(work_tile)
        out[start] = u32(ptx.pack_f16x2(o0, o1))
        out[start + 1] = u32(ptx.pack_f16x2(o2, o3))

    @ptx.device_function
    def stage_queries(q, sequence, query_0, query_1, kv, lane, t, q_regs, words):
        """Q to shared memory as A fragments, so that it takes no registers in the loop over keys."""
        for h in range(2):
            query = query_0 if h == 0 else query_1
            start = (sequence + query // gqa_ratio) * q_row + (kv * gqa_ratio + query % gqa_ratio) * head_words
            load_row(q, start, t, q_regs, h * row_registers)
        for i in range(row_registers // 2):
            for h in range(2):
                index = i * 128 + lane * 4 + h
                words[index] = q_regs[h * row_registers + 2 * i]
                words[index + 2] = q_regs[h * row_registers + 2 * i + 1]

    @ptx.device_function
    def score(product, key, last):
        """A score in units of log2(e); masked beyond the last key that its row sees, and before the window."""
        if key > last or (window > 0 and key <= last - window):
            return LOWEST
        return capped(product) if soft_cap > 0 else product * scale

    @ptx.device_function
    def scores_of(words, k_regs, key, last_0, last_1, lane):
        """Scores of a step in units of log2(e), masked beyond the last key that each row sees."""
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(row_registers // 2):
            a0, a1, a2, a3 = ptx.load_shared_16(words, i * 128 + lane * 4)
            b0, b1 = k_regs[2 * i], k_regs[2 * i + 1]
            s0, s1, s2, s3 = ptx.mma(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
            b0, b1 = k_regs[row_registers + 2 * i], k_regs[row_registers + 2 * i + 1]
            s4, s5, s6, s7 = ptx.mma(a0, a1, a2, a3, b0, b1, s4, s5, s6, s7)
        s0 = score(s0, i32(key), last_0)
        s1 = score(s1, i32(key + 1), last_0)
        s2 = score(s2, i32(key), last_1)
        s3 = score(s3, i32(key + 1), last_1)
        s4 = score(s4, i32(key + 8), last_0)
        s5 = score(s5, i32(key + 9), last_0)
        s6 = score(s6, i32(key + 8), last_1)
        s7 = score(s7, i32(key + 9), last_1)
        return s0, s1, s2, s3, s4, s5, s6, s7

    @ptx.device_function
    def store_warp(floats, out_regs, m_0, m_1, l_0, l_1, warp, g, t):
        """A warp's partial result to shared memory."""
        for h in range(2):
            row = g + 8 * h
            if row < rows:
                for j in range(out_registers // 4):
                    for column in range(2):
                        index = out_start + (warp * rows + row) * value_dim + element(t, column, j)
                        floats[index] = out_regs[4 * j + 2 * h + column]
                if t == 0:
                    index = stats_start + (warp * rows + row) * 2
                    floats[index] = m_0 if h == 0 else m_1
                    floats[index + 1] = l_0 if h == 0 else l_1

    @ptx.device_function
    def store_cta(io, floats, sequence, counter, work_tile, split, active_splits, first_query, kv, thread):
        """Combine the warps: to `out` if the sequence is not split, else to `partials`."""
        cta = counter * kv_splits + split
        entry = thread
        while entry < vectors:
            row, d = entry // (value_dim // 4), entry % (value_dim // 4) * 4
            m, row_sum, o0, o1, o2, o3 = combine_warps(floats, warps, row, d)
            if active_splits == 1:
                if first_query + row < queries:
                    query = first_query + row
                    o0, o1, o2, o3 = o0 / row_sum, o1 / row_sum, o2 / row_sum, o3 / row_sum
                    store_out(io.out, sequence, query, kv, work_tile, d, o0, o1, o2, o3)
            else:
                index = (cta * rows + row) * value_dim + d
                io.partials[index], io.partials[index + 1] = o0, o1
                io.partials[index + 2], io.partials[index + 3] = o2, o3
                if d == 0:
                    index = stats_global + (cta * rows + row) * 2
                    io.partials[index], io.partials[index + 1] = m, row_sum
            entry += threads

    @ptx.device_function
    def is_last(io, words, counter, active_splits, thread):
        """Whether this CTA is the last of its work tile, so that it may read what the others wrote: each wrote, fenced,
        passed the barrier and then counted; this one counted last, and fences before it reads.
        """
        cuda.threadfence()
        cuda.syncthreads()
        if thread == 0:
            words[flag_index] = cuda.atomic.inc(io.counters, counter, u32(active_splits - 1))
        cuda.syncthreads()
        return words[flag_index] == active_splits - 1

    @ptx.device_function
    def store_combined(io, floats, loaded, sequence, counter, work_tile, active_splits, first_query, kv, thread):
        """Combine the KV splits, to `out`."""
        cuda.threadfence()
        first_cta = counter * kv_splits
        entry = thread
        while entry < active_splits * rows * 2:
            index = stats_global + first_cta * rows * 2 + entry
            floats[out_start + entry] = ptx.load_relaxed_f32(io.partials, index)
            entry += threads
        cuda.syncthreads()
        entry = thread
        while entry < vectors:
            row, d = entry // (value_dim // 4), entry % (value_dim // 4) * 4
            row_sum, o0, o1, o2, o3 = combine_splits(io.partials, floats, loaded, first_cta, active_splits, row, d)
            if first_query + row < queries:
                query = first_query + row
                o0, o1, o2, o3 = o0 / row_sum, o1 / row_sum, o2 / row_sum, o3 / row_sum
                store_out(io.out, sequence, query, kv, work_tile, d, o0, o1, o2, o3)
            entry += threads

    @ptx.device_function
    def attend(io):
        floats = cuda.shared.array(0, float32)
        words = cuda.shared.array(0, uint32)
        q_regs = cuda.local.array(k_registers, uint32)
        k_regs = cuda.local.array(k_registers, uint32)
        v_regs = cuda.local.array(v_registers, uint32)
        out_regs = cuda.local.array(out_registers, float32)
        loaded = cuda.local.array(load_registers, float32)
        if dependent:
            ptx.let_next_kernel_start()
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        split, counter = cuda.blockIdx.x % kv_splits, cuda.blockIdx.x // kv_splits
        sequence = counter // work_tiles if batched else int64(0)
        work_tile = counter % work_tiles if batched else counter
        kv, first_query = counter % kv_heads, work_tile // kv_heads * 16
        if value_parts > 1:
            first_query = work_tile // kv_heads % query_tiles * 16
        sequence_start = sequence_start_of(io, sequence)

        length = position_of(io, sequence) + tokens
        begin = max(position_of(io, sequence) + 1 - window, int64(0)) if window > 0 else int64(0)
        split_keys = ((length - begin + kv_splits - 1) // kv_splits + step_keys - 1) // step_keys * step_keys
        if length - begin <= _UNSPLIT_STEPS * step_keys:
            split_keys = int64(_UNSPLIT_STEPS * step_keys)
        active_splits = (length - begin + split_keys - 1) // split_keys
        if split >= active_splits:
            return
        start, end = begin + split * split_keys, min(length, begin + (split + 1) * split_keys)
        base = start + warp * KEYS
        # No launch of this step moves the position or writes to earlier keys: loading them needs no wait.
        preloaded = dependent and base < end and base + KEYS <= cached(io, sequence)
        if preloaded:
            load_step(io, sequence_start, base, length, kv, work_tile, g, t, k_regs, v_regs)
        if dependent:
            ptx.wait_for_previous_kernel()

        query_0, query_1 = min(first_query + g, queries - 1), min(first_query + g + 8, queries - 1)
        # The last key that each row sees (causal mask). 32 bits, to save registers on sm_80.
        last_0 = i32(position_of(io, sequence) + (query_0 // gqa_ratio if tokens > 1 else 0))
        last_1 = i32(position_of(io, sequence) + query_1 // gqa_ratio) if tokens > 1 else last_0
        if warp == 0:
            stage_queries(io.q, sequence, query_0, query_1, kv, lane, t, q_regs, words)
        cuda.syncthreads()

        for i in range(out_registers):
            out_regs[i] = _ZERO
        m_0, m_1, l_0, l_1 = LOWEST, LOWEST, _ZERO, _ZERO  # running max and row sum of rows g and g + 8
        while base < end:
            if not preloaded:
                load_step(io, sequence_start, base, length, kv, work_tile, g, t, k_regs, v_regs)
            preloaded = False
            scores = scores_of(words, k_regs, base + 2 * t, last_0, last_1, lane)
            m_0, m_1, l_0, l_1 = softmax_step(m_0, m_1, l_0, l_1, scores, v_regs, out_regs)
            base += step_keys

        store_warp(floats, out_regs, m_0, m_1, quad_sum(l_0), quad_sum(l_1), warp, g, t)
        cuda.syncthreads()
        store_cta(io, floats, sequence, counter, work_tile, split, active_splits, first_query, kv, thread)
        if active_splits == 1 or not is_last(io, words, counter, active_splits, thread):
            return
        store_combined(io, floats, loaded, sequence, counter, work_tile, active_splits, first_query, kv, thread)

    return attend
