"""Grouped-query attention of 1 to 8 tokens over a float16 KV cache, split over the sequence, on tensor cores.

A block takes one key/value head, up to 16 of the queries that share it (a query is a token and a head), and one chunk
of the sequence. Its warps take turns over steps of 16 keys: scores Q K^T and sums P V are `mma.m16n8k16`, softmax is
the online one in float32. Both products may permute what they sum over and where a column of the result goes, and use
that to load 16 bytes at a time: for K, a lane's 8 neighbouring elements stand for 4 pairs of the inner dimension; for
V, they are 8 columns of the result, and `prmt` pairs the elements of neighbouring keys.

The sums of the warps, then of the chunks, are added in a fixed order. The block that comes last for its head and
queries (an atomic counter that wraps to zero by itself) adds up the chunks: no second kernel, and the same result
whichever block it is. How long a chunk is follows from the length alone, which is read from device memory: the launch
is the same at every length, and blocks without a chunk leave at once.

Keys beyond the last token are never loaded (their place is taken by the last valid one, with weight 0): whatever the
cache holds there changes nothing.

Paged (`make_paged_attention`): the same work for each of up to 8 tokens of any sequences, a token with its heads being
what a block's queries are. Only the row of the cache in which a key lies is found in another way: a step's 16 keys
begin at a multiple of 16, so that their place takes one look into the page table (two for blocks of 8). With
`Paging(block_size=0)` every sequence has a contiguous part of the cache instead, and there is no table: what paging is
measured against.

Cost model: 4 * length * kv_heads * head_dim bytes. Llama 3.2 3B (8 heads of 128): at 4,096 positions 16.8 MB, 3.6 us
at 4.66 TB/s, predicted 7-9 us with launch, ramp and the last block's additions; at 16,384 67 MB, 14.4 us, predicted
18-22 us. Below 1,000 positions it is all latency: 4-5 us.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import make_combine
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, Paging
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum

KEYS = 16  # per step of a warp
_ALONE = 2  # steps of a block that are sooner done by one than shared, with what adding up the chunks takes
_BATCH = 8  # chunks that the last block loads at a time
_ZERO = np.float32(0.0)


def make_attend(shape: AttentionShape, paging: Paging | None, dependent: bool) -> Any:
    """Device function with the arguments of `make_paged_attention`; without paging, only `positions` [1] is read of
    positions, known, rows and pages.
    """
    head_dim, columns, warps, threads = shape.head_dim, shape.tokens, shape.warps, shape.threads
    splits, rows, queries, kv_heads = shape.kv_splits, shape.rows, shape.queries, shape.kv_heads
    ratio = shape.heads // kv_heads
    q_row, kv_row, out_row = shape.heads * head_dim // 2, kv_heads * head_dim // 2, shape.out_width // 2
    head_words = head_dim // 2
    fragments = make_head_fragments(head_dim)
    row_registers, per_key = fragments.row_registers, fragments.value_registers
    load_row, load_value, element = fragments.load_row, fragments.load_value, fragments.element
    k_registers, v_registers = 2 * row_registers, 4 * per_key
    softmax_step = make_softmax_step(per_key, half_tile=False)
    sum_registers = head_dim // 2
    step_keys = KEYS * warps
    quads = rows * head_dim // 4
    sums_start = shape.q_words
    stats_start = sums_start + warps * rows * head_dim
    combine = make_combine(head_dim, rows, sums_start, stats_start)
    flag_index = shape.shared_bytes // 4 - 1
    tokens = 1 if paging is None else paging.tokens
    stats_global = tokens * shape.ctas * rows * head_dim
    paged = paging is not None
    block_size, stride = (0, 0) if paging is None else (paging.block_size, paging.stride)
    same_page = block_size % KEYS == 0  # both halves of a step's keys lie in one block
    units = shape.work_tiles
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))

    @ptx.device_function
    def find_page(pages, first, key):
        """What is added to a key's position, or to its place in its block, to give its row of the cache."""
        # 32 bits, as every register counts on sm_80.
        return pages[first + np.int32(key) // block_size] * block_size if block_size > 0 else first

    @ptx.device_function
    def row_of(page, key):
        if block_size > 0:
            return int64(page + np.int32(key) % block_size)
        return page + key if paged else key

    @ptx.device_function
    def load_step(keys, values, pages, first_page, base, length, kv, g, t, k_part, v_part):
        """A lane's part of the keys and values of one step."""
        page_0 = find_page(pages, first_page, base)
        # Keys behind the last one are replaced by it: where the second half has none of its own, it is in the first.
        page_1 = page_0 if same_page else find_page(pages, first_page, min(base + 8, length - 1))
        for h in range(2):
            key = min(base + h * 8 + g, length - 1)
            row = row_of(page_0 if h == 0 else page_1, key)
            load_row(keys, row * kv_row + kv * head_words, t, k_part, h * row_registers)
        for i in range(4):
            key = min(base + 2 * t + i % 2 + i // 2 * 8, length - 1)
            row = row_of(page_0 if i // 2 == 0 else page_1, key)
            load_value(values, row * kv_row + kv * head_words, g, v_part, i * per_key)

    @ptx.device_function
    def put(out, token, query, kv, d, o0, o1, o2, o3):
        """Four elements of a query's result."""
        start = (token + query // ratio) * out_row + (kv * ratio + query % ratio) * head_words + d // 2
        out[start] = np.uint32(ptx.pack_f16x2(o0, o1))
        out[start + 1] = np.uint32(ptx.pack_f16x2(o2, o3))

    @ptx.device_function
    def attend(q, keys, values, positions, known, rows_of, pages, partials, counters, out):
        floats = cuda.shared.array(0, float32)
        words = cuda.shared.array(0, uint32)
        q_part = cuda.local.array(k_registers, uint32)
        k_part = cuda.local.array(k_registers, uint32)
        v_part = cuda.local.array(v_registers, uint32)
        sums = cuda.local.array(sum_registers, float32)
        loaded = cuda.local.array(32, float32)
        if dependent:
            ptx.let_next_kernel_start()
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        split, unit = cuda.blockIdx.x % splits, cuda.blockIdx.x // splits
        token = unit // units if paged else int64(0)
        tile = unit % units if paged else unit
        kv, first_query = unit % kv_heads, tile // kv_heads * 16
        first_page = np.int32(rows_of[token] * stride) if paged else np.int32(0)

        length = positions[token] + columns
        chunk = ((length + splits - 1) // splits + step_keys - 1) // step_keys * step_keys
        if length <= _ALONE * step_keys:
            chunk = int64(_ALONE * step_keys)
        active = (length + chunk - 1) // chunk
        if split >= active:
            return
        start, end = split * chunk, min(length, (split + 1) * chunk)
        base = start + warp * KEYS
        # Nothing of this step's launches moves the position or writes to earlier keys: they need not be waited for.
        early = dependent and base < end and base + KEYS <= known[token]
        if early:
            load_step(keys, values, pages, first_page, base, length, kv, g, t, k_part, v_part)
        if dependent:
            ptx.wait_for_previous_kernel()

        query_0, query_1 = min(first_query + g, queries - 1), min(first_query + g + 8, queries - 1)
        # The last key that each sees. 32 bits, as every register counts on sm_80.
        limit_0 = np.int32(positions[token] + (query_0 // ratio if columns > 1 else 0))
        limit_1 = np.int32(positions[token] + query_1 // ratio) if columns > 1 else limit_0
        if warp == 0:
            # Queries go to shared memory as A fragments, so that they take no registers in the loop.
            for h in range(2):
                query = query_0 if h == 0 else query_1
                start_q = (token + query // ratio) * q_row + (kv * ratio + query % ratio) * head_words
                load_row(q, start_q, t, q_part, h * row_registers)
            for i in range(row_registers // 2):
                for h in range(2):
                    at = i * 128 + lane * 4 + h
                    words[at] = q_part[h * row_registers + 2 * i]
                    words[at + 2] = q_part[h * row_registers + 2 * i + 1]
        cuda.syncthreads()

        for i in range(sum_registers):
            sums[i] = _ZERO
        m_0, m_1, l_0, l_1 = LOWEST, LOWEST, _ZERO, _ZERO
        while base < end:
            if not early:
                load_step(keys, values, pages, first_page, base, length, kv, g, t, k_part, v_part)
            early = False
            s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
            s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO
            for i in range(row_registers // 2):
                a0, a1, a2, a3 = ptx.load_block_16(words, i * 128 + lane * 4)
                b0, b1 = k_part[2 * i], k_part[2 * i + 1]
                s0, s1, s2, s3 = ptx.mma(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
                b0, b1 = k_part[row_registers + 2 * i], k_part[row_registers + 2 * i + 1]
                s4, s5, s6, s7 = ptx.mma(a0, a1, a2, a3, b0, b1, s4, s5, s6, s7)
            key = base + 2 * t
            s0 = s0 * scale if np.int32(key) <= limit_0 else LOWEST
            s1 = s1 * scale if np.int32(key + 1) <= limit_0 else LOWEST
            s2 = s2 * scale if np.int32(key) <= limit_1 else LOWEST
            s3 = s3 * scale if np.int32(key + 1) <= limit_1 else LOWEST
            s4 = s4 * scale if np.int32(key + 8) <= limit_0 else LOWEST
            s5 = s5 * scale if np.int32(key + 9) <= limit_0 else LOWEST
            s6 = s6 * scale if np.int32(key + 8) <= limit_1 else LOWEST
            s7 = s7 * scale if np.int32(key + 9) <= limit_1 else LOWEST
            scores = s0, s1, s2, s3, s4, s5, s6, s7
            m_0, m_1, l_0, l_1 = softmax_step(m_0, m_1, l_0, l_1, scores, v_part, sums)
            base += step_keys

        # The warps' sums meet in shared memory.
        l_0, l_1 = quad_sum(l_0), quad_sum(l_1)
        for h in range(2):
            row = g + 8 * h
            if row < rows:
                for j in range(sum_registers // 4):
                    for column in range(2):
                        at = sums_start + (warp * rows + row) * head_dim + element(t, column, j)
                        floats[at] = sums[4 * j + 2 * h + column]
                if t == 0:
                    at = stats_start + (warp * rows + row) * 2
                    floats[at] = m_0 if h == 0 else m_1
                    floats[at + 1] = l_0 if h == 0 else l_1
        cuda.syncthreads()
        block = unit * splits + split
        entry = thread
        while entry < quads:
            row, d = entry // (head_dim // 4), entry % (head_dim // 4) * 4
            peak, total, o0, o1, o2, o3 = combine(floats, warps, row, d)
            if active == 1:
                if first_query + row < queries:
                    put(out, token, first_query + row, kv, d, o0 / total, o1 / total, o2 / total, o3 / total)
            else:
                at = (block * rows + row) * head_dim + d
                partials[at], partials[at + 1], partials[at + 2], partials[at + 3] = o0, o1, o2, o3
                if d == 0:
                    at = stats_global + (block * rows + row) * 2
                    partials[at], partials[at + 1] = peak, total
            entry += threads
        if active == 1:
            return

        # The last block of its unit adds up the chunks. Its reads come after all writes of the others: each wrote,
        # fenced, met at the barrier and then counted; this one counted last, and fences before it reads.
        cuda.threadfence()
        cuda.syncthreads()
        if thread == 0:
            words[flag_index] = cuda.atomic.inc(counters, unit, np.uint32(active - 1))
        cuda.syncthreads()
        if words[flag_index] != active - 1:
            return
        cuda.threadfence()
        first_block = unit * splits
        entry = thread
        while entry < active * rows * 2:
            floats[sums_start + entry] = ptx.load_remote_f32(partials, stats_global + first_block * rows * 2 + entry)
            entry += threads
        cuda.syncthreads()
        entry = thread
        while entry < quads:
            row, d = entry // (head_dim // 4), entry % (head_dim // 4) * 4
            peak, total = LOWEST, _ZERO
            for s in range(active):
                peak = max(peak, floats[sums_start + (s * rows + row) * 2])
            for s in range(active):
                total += (
                    ptx.exp2(floats[sums_start + (s * rows + row) * 2] - peak)
                    * floats[sums_start + (s * rows + row) * 2 + 1]
                )
            o0, o1, o2, o3 = _ZERO, _ZERO, _ZERO, _ZERO
            s = 0
            while s < active:
                for i in range(_BATCH):
                    at = ((first_block + min(s + i, active - 1)) * rows + row) * head_dim + d
                    l0, l1, l2, l3 = ptx.load_remote_f32x4(partials, at)
                    loaded[4 * i], loaded[4 * i + 1], loaded[4 * i + 2], loaded[4 * i + 3] = l0, l1, l2, l3
                for i in range(_BATCH):
                    if s + i < active:
                        weight = ptx.exp2(floats[sums_start + ((s + i) * rows + row) * 2] - peak)
                        o0 += weight * loaded[4 * i]
                        o1 += weight * loaded[4 * i + 1]
                        o2 += weight * loaded[4 * i + 2]
                        o3 += weight * loaded[4 * i + 3]
                s += _BATCH
            if first_query + row < queries:
                put(out, token, first_query + row, kv, d, o0 / total, o1 / total, o2 / total, o3 / total)
            entry += threads

    return attend
