"""Attention of a prefill chunk with `mma.m16n8k16`, `ldmatrix` and `cp.async`: for GPUs without wgmma.

A warp has 16 or 32 queries, with their outputs in registers; Q, K and V are in shared memory, where V of a block
arrives while the block's scores are computed, and the next block's K during softmax and P V (FlashAttention-2's order).
Key blocks run from the last one backwards, so that the causal mask and the keys that do not exist are in the first.

Cost model: 4 * heads * head_dim operations for every pair of a query and a key that it sees, at 50-60 % of the tensor
cores' rate: ldmatrix reads K and V once per warp, as many bytes per operation as shared memory can just deliver with 32
queries per warp.
"""

import math
from typing import Any

from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.attention.prefill_softmax import (
    MASKED,
    make_mask,
    make_mask_window,
    make_softmax,
    make_store_rows,
)
from numba_atomflow.ops.cuda.attention.prefill_split import make_combine_splits, make_find_work
from numba_atomflow.ops.cuda.attention.prefill_tiles import make_copy_rows
from numba_atomflow.ops.cuda.elementwise import make_soft_cap
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_ZERO = f32(0.0)


def make_prefill_attention_mma(plan: PrefillAttentionPlan, dependent: bool = False) -> Any:
    """Kernel (`PrefillAttentionArguments`). Launch: `plan.ctas(tokens)` CTAs of `plan.threads` threads with
    `plan.shared_bytes` of dynamic shared memory.
    """
    heads, head_dim, gqa_ratio = plan.heads, plan.head_dim, plan.heads // plan.kv_heads
    query_tile, key_block, row_blocks = plan.query_tile, plan.key_block, plan.row_blocks
    q_bytes, kv_bytes = plan.q_bytes, plan.kv_bytes
    q_column_block, kv_column_block = query_tile * 128, key_block * 128
    k_steps, key_steps, column_pairs = head_dim // 16, key_block // 16, head_dim // 16
    score_registers, out_registers = key_block // 2, head_dim // 2  # of 16 rows
    scores_size, outs_size, stats_size = row_blocks * score_registers, row_blocks * out_registers, 2 * row_blocks
    wait_copies = ptx.make_wait_copies(0)
    copy_q = make_copy_rows(head_dim, heads * head_dim, query_tile, plan.threads)
    copy_kv = make_copy_rows(head_dim, plan.kv_heads * head_dim, key_block, plan.threads)
    window, soft_cap, root = plan.window, plan.soft_cap, math.sqrt(head_dim)
    mask, mask_window = make_mask(key_block), make_mask_window(key_block, window)
    capped = make_soft_cap(soft_cap or 1.0, 1.0 / root, root)  # softmax divides by the root
    softmax = make_softmax(key_block, head_dim)
    store_rows = make_store_rows(plan)
    shared_keys = plan.sms > 1
    find_work, combine_splits = make_find_work(plan), make_combine_splits(plan)

    @ptx.device_function
    def multiply_keys(shared, q_at, k_at, a_offsets, b_offsets, s):
        """S = Q K^T: s[row block][key tile of 8][4]."""
        for i in range(scores_size):
            s[i] = _ZERO
        for step in range(k_steps):
            q_now = q_at + step // 4 * q_column_block + a_offsets[step % 4]
            k_now = k_at + step // 4 * kv_column_block + b_offsets[step % 4]
            for pair in range(key_steps):
                b0, b1, b2, b3 = ptx.load_matrix(shared, u32(k_now + pair * 2048))
                for block in range(row_blocks):
                    a0, a1, a2, a3 = ptx.load_matrix(shared, u32(q_now + block * 2048))
                    i = block * score_registers + pair * 8
                    c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, s[i], s[i + 1], s[i + 2], s[i + 3])
                    s[i], s[i + 1], s[i + 2], s[i + 3] = c0, c1, c2, c3
                    c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, s[i + 4], s[i + 5], s[i + 6], s[i + 7])
                    s[i + 4], s[i + 5], s[i + 6], s[i + 7] = c0, c1, c2, c3

    def make_add_values(step: int) -> Any:
        """Device function: O += P V of 16 keys."""
        p = step * 8

        @ptx.device_function
        def add_values(shared, v_at, a_offsets, s, o):
            for pair in range(column_pairs):
                v_now = v_at + pair // 4 * kv_column_block + step * 2048 + a_offsets[pair % 4]
                b0, b1, b2, b3 = ptx.load_matrix_transposed(shared, u32(v_now))
                for block in range(row_blocks):
                    j = block * score_registers + p
                    a0, a1 = ptx.pack_f16x2(s[j], s[j + 1]), ptx.pack_f16x2(s[j + 2], s[j + 3])
                    a2, a3 = ptx.pack_f16x2(s[j + 4], s[j + 5]), ptx.pack_f16x2(s[j + 6], s[j + 7])
                    i = block * out_registers + pair * 8
                    c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, o[i], o[i + 1], o[i + 2], o[i + 3])
                    o[i], o[i + 1], o[i + 2], o[i + 3] = c0, c1, c2, c3
                    c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, o[i + 4], o[i + 5], o[i + 6], o[i + 7])
                    o[i + 4], o[i + 5], o[i + 6], o[i + 7] = c0, c1, c2, c3

        if step == 0:
            return add_values
        add_values_before = make_add_values(step - 1)

        @ptx.device_function
        def add_all_values(shared, v_at, a_offsets, s, o):
            add_values_before(shared, v_at, a_offsets, s, o)
            add_values(shared, v_at, a_offsets, s, o)

        return add_all_values

    add_values = make_add_values(key_steps - 1)  # a loop of so many statements is not unrolled

    @ptx.device_function
    def rescale_outs(s, o, maxima, row_sums, block):
        """Scores to weights, and the outputs so far to the new maxima, of one block of 16 rows."""
        rescale_0, rescale_1 = softmax(s, block * score_registers, maxima, row_sums, 2 * block)
        for j in range(out_registers // 4):
            i = block * out_registers + 4 * j
            o[i], o[i + 1] = o[i] * rescale_0, o[i + 1] * rescale_0
            o[i + 2], o[i + 3] = o[i + 2] * rescale_1, o[i + 3] * rescale_1

    @ptx.kernel(plan.threads, 1)
    def prefill_attention(io):
        shared = cuda.shared.array(0, uint32)
        s = cuda.local.array(scores_size, float32)
        o = cuda.local.array(outs_size, float32)
        maxima = cuda.local.array(stats_size, float32)
        row_sums = cuda.local.array(stats_size, float32)
        a_offsets = cuda.local.array(4, uint32)
        b_offsets = cuda.local.array(4, uint32)
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        count, position = io.count[0], io.position[0]  # no kernel of a step writes them before its end
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        tile, head, _, _, _, block, end = find_work(cuda.blockIdx.x, cuda.gridDim.x, position, count)
        if tile < 0:
            return
        first = tile * query_tile
        q_at = u32((ptx.shared_address(shared, 0) + u32(127)) & u32(0xFFFFFF80))
        k_at, v_at = u32(q_at + u32(q_bytes)), u32(q_at + u32(q_bytes + kv_bytes))
        # Of the four matrices of ldmatrix, lane 8 i + r has row r of matrix i: A and V go down the rows first, K last.
        matrix, r = lane >> 3, lane & 7
        for step in range(4):
            a_offsets[step] = ((matrix & 1) * 8 + r) * 128 + ((2 * step + (matrix >> 1)) ^ r) * 16
            b_offsets[step] = ((matrix >> 1) * 8 + r) * 128 + ((2 * step + (matrix & 1)) ^ r) * 16
        for i in range(outs_size):
            o[i] = _ZERO
        for i in range(stats_size):
            maxima[i], row_sums[i] = MASKED, _ZERO

        length = position + count
        kv_start = head // gqa_ratio * head_dim
        copy_q(shared, q_at, io.q, head * head_dim, first, count, thread)
        copy_kv(shared, k_at, io.keys, kv_start, block * key_block, length, thread)
        ptx.commit_copies()
        row = warp * 16 * row_blocks
        while block >= end:
            wait_copies()
            cuda.syncthreads()  # K is there, and V has been read
            copy_kv(shared, v_at, io.values, kv_start, block * key_block, length, thread)
            ptx.commit_copies()
            multiply_keys(shared, u32(q_at + row * 128), k_at, a_offsets, b_offsets, s)
            wait_copies()
            cuda.syncthreads()  # V is there, and K has been read
            if block > end:
                copy_kv(shared, k_at, io.keys, kv_start, (block - 1) * key_block, length, thread)
                ptx.commit_copies()
            if soft_cap > 0:
                for i in range(scores_size):
                    s[i] = capped(s[i])
            if window > 0 and block * key_block < position + first + query_tile - window:
                last = i32(position + first + row + g - block * key_block)
                mask_window(s, 0, last, i32(t))
                if row_blocks > 1:
                    mask_window(s, score_registers, i32(last + 16), i32(t))
            if (block + 1) * key_block > position + first + 1:
                last = i32(position + first + row + g - block * key_block)
                mask(s, 0, last, i32(t))
                if row_blocks > 1:
                    mask(s, score_registers, i32(last + 16), i32(t))
            rescale_outs(s, o, maxima, row_sums, 0)
            if row_blocks > 1:
                rescale_outs(s, o, maxima, row_sums, 1)
            add_values(shared, v_at, a_offsets, s, o)
            block -= 1
        if shared_keys:
            # Found again: kept, they would take registers in the loop.
            cta = cuda.blockIdx.x
            _, _, split, counter, active, _, _ = find_work(cta, cuda.gridDim.x, io.position[0], io.count[0])
            first_cta = cta - split
            if active > 1 and not combine_splits(
                io, shared, o, maxima, row_sums, first_cta, split, active, counter, thread
            ):
                return
        token = first + row + g
        store_rows(io.out, o, 0, row_sums, 0, token, count, head, t)
        if row_blocks > 1:
            store_rows(io.out, o, out_registers, row_sums, 2, token + 16, count, head, t)

    return prefill_attention
