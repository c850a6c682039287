"""Attention of a prefill chunk with `wgmma` (sm_90): FlashAttention-3's pipeline.

Two consumer warpgroups have 64 queries each; a producer warpgroup copies Q, and the blocks of K and V into a pipeline
of stages in shared memory. Both products are wgmmas: S = Q K^T from shared memory; O += P V with P, the weights in
float16, from registers, and V as it lies, keys from row to row.

What overlaps: a warpgroup issues S of the next block before O += P V of the last one, and computes the softmax of S
while P V runs. And the warpgroups take turns: named barriers let one issue its products when the other has, so that one
computes its softmax while the tensor cores work for the other.

Key blocks run from the last one backwards: the causal mask and the keys that do not exist are in the first ones. A
column block of 64 that the head fills only in part is multiplied as a whole in P V, and the rest of O discarded.

Synchronisation: `full` barriers count the producer's threads, which arrive when their copies have (cp.async writes
through the generic proxy, wgmma reads through the async proxy: every consumer thread fences after it has waited);
`empty` barriers count the consumer warps, which arrive when the wgmmas that read a stage are complete. Q arrives with
the first K.

Cost model: 4 * heads * head_dim operations for every pair of a query and a key that it sees. A block of 128 x 128 with
heads of 128 takes the tensor cores 2,048 cycles; softmax takes each of the 4 schedulers some 600 issue slots for two
warps, and exp2 1,024 cycles of the special function units.
"""

from typing import Any

import numpy as np
from numba import cuda, float32, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_fp8 import make_store_rows_fp8
from numba_atomflow.ops.cuda.attention.prefill_plan import WARPGROUP_ROWS, PrefillAttentionPlan
from numba_atomflow.ops.cuda.attention.prefill_softmax import MASKED, make_mask, make_softmax, make_store_rows
from numba_atomflow.ops.cuda.attention.prefill_split import make_combine_splits, make_find_work
from numba_atomflow.ops.cuda.attention.prefill_tiles import make_copy_rows
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_WARPGROUP = 128  # threads
_TURN_BARRIERS = 1  # the first of the named barriers at which warpgroups wait for their turn
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232  # per thread: 128 * (40 + 2 * 232) are the SM's 65,536 less 1,024
_ZERO = f32(0.0)


def _chain(parts: list[Any]) -> Any:
    """Device function of four arguments that calls `parts` in turn: a loop over wgmmas might not be unrolled."""
    if len(parts) == 1:
        return parts[0]
    first, others = parts[0], _chain(parts[1:])

    @ptx.device_function
    def call_all(a, b, c, d):
        first(a, b, c, d)
        others(a, b, c, d)

    return call_all


def _make_scores(plan: PrefillAttentionPlan) -> Any:
    """Device function (s, words, q, k): starts S = Q K^T, with descriptors of Q and K."""

    def make_step(step: int) -> Any:
        wgmma = ptx.make_wgmma(plan.key_block, a_first=None, accumulate=step > 0)
        column_block, within = step // 4, step % 4 * ptx.K_STEP_WORDS
        q_offset = np.uint64(column_block * plan.query_tile * 8 + within)
        k_offset = np.uint64(column_block * plan.key_block * 8 + within)

        @ptx.device_function
        def multiply(s, words, q, k):
            wgmma(s, words, q + q_offset, k + k_offset)

        return multiply

    return _chain([make_step(step) for step in range(plan.head_dim // 16)])


def _make_outputs(plan: PrefillAttentionPlan) -> Any:
    """Device function (o, p, words, v): starts O += P V, with a descriptor of V."""

    def make_step(step: int) -> Any:
        wgmma = ptx.make_wgmma(plan.column_blocks * 64, a_first=4 * step, transposed=True)
        v_offset = np.uint64(step * 128)  # 16 keys of 128 bytes, in the descriptor's 16 bytes

        @ptx.device_function
        def multiply(o, p, words, v):
            wgmma(o, p, words, v + v_offset)

        return multiply

    return _chain([make_step(step) for step in range(plan.key_block // 16)])


def make_prefill_attention_wgmma(plan: PrefillAttentionPlan, dependent: bool = False) -> Any:
    """Kernel (`PrefillAttentionArguments`). Launch: `plan.ctas(tokens)` CTAs of `plan.threads` threads with
    `plan.shared_bytes` of dynamic shared memory.
    """
    heads, head_dim, gqa_ratio = plan.heads, plan.head_dim, plan.heads // plan.kv_heads
    query_tile, key_block, stages = plan.query_tile, plan.key_block, plan.stages
    kv_bytes, column_block_bytes = plan.kv_bytes, plan.key_block * 128
    consumers, consumer_warps = plan.consumer_warps * 32, plan.consumer_warps
    k_start, v_start = plan.q_bytes, plan.q_bytes + stages * kv_bytes
    full_start = plan.barriers_start
    empty_start = full_start + 16 * stages
    scores_size, outs_size, weights_size = key_block // 2, plan.column_blocks * 32, key_block // 4
    takes_turns = plan.turns and consumers == 2 * _WARPGROUP
    stage_words = np.uint64(kv_bytes >> 4)
    first_q_words = np.uint64(WARPGROUP_ROWS * 128 >> 4)

    start_scores, start_outputs = _make_scores(plan), _make_outputs(plan)
    s_registers, o_registers = ptx.Registers(scores_size), ptx.Registers(outs_size)
    p_registers = ptx.Registers(weights_size)
    fence_scores = ptx.make_wgmma_fence(s_registers)
    fence_outputs = ptx.make_wgmma_fence(o_registers, p_registers)
    wait_scores = ptx.make_wgmma_wait(0, s_registers)
    wait_scores_only = ptx.make_wgmma_wait(1, s_registers)
    wait_outputs = ptx.make_wgmma_wait(0, o_registers, p_registers, s_registers)
    give_registers = ptx.make_set_registers("dec", _PRODUCER_REGISTERS)
    take_registers = ptx.make_set_registers("inc", _CONSUMER_REGISTERS)
    wait_copies = ptx.make_wait_copies(0)

    copy_q = make_copy_rows(head_dim, heads * head_dim, query_tile, _WARPGROUP)
    copy_last = make_copy_rows(head_dim, plan.kv_heads * head_dim, key_block, _WARPGROUP)
    copy_whole = make_copy_rows(head_dim, plan.kv_heads * head_dim, key_block, _WARPGROUP, all_exist=True)
    mask = make_mask(key_block)
    softmax = make_softmax(key_block, head_dim)
    store_rows = make_store_rows_fp8(plan) if plan.out.bits == 8 else make_store_rows(plan)
    shared_keys = plan.sms > 1
    find_work, combine_splits = make_find_work(plan), make_combine_splits(plan)

    @ptx.device_function
    def produce(io, words, barriers, base, head, first, count, length, block, end, thread):
        """Copy Q, then K and V of every block."""
        kv_first = head // gqa_ratio * head_dim
        copy_q(words, base, io.q, head * head_dim, first, count, thread)
        copy_last(words, u32(base + k_start), io.keys, kv_first, block * key_block, length, thread)
        ptx.barrier_arrive_on_copies(barriers, u32(base + full_start))
        copy_last(words, u32(base + v_start), io.values, kv_first, block * key_block, length, thread)
        ptx.barrier_arrive_on_copies(barriers, u32(base + full_start + 8))
        stage, phase = u32(1), u32(0)
        while block > end:
            block -= 1
            full, empty = u32(base + full_start + 16 * stage), u32(base + empty_start + 16 * stage)
            ptx.barrier_wait(barriers, empty, u32(phase ^ u32(1)))
            k_at = u32(base + k_start + stage * kv_bytes)
            copy_whole(words, k_at, io.keys, kv_first, block * key_block, length, thread)
            ptx.barrier_arrive_on_copies(barriers, full)
            ptx.barrier_wait(barriers, u32(empty + 8), u32(phase ^ u32(1)))
            v_at = u32(base + v_start + stage * kv_bytes)
            copy_whole(words, v_at, io.values, kv_first, block * key_block, length, thread)
            ptx.barrier_arrive_on_copies(barriers, u32(full + 8))
            stage = u32(stage + u32(1))
            if stage == stages:
                stage, phase = u32(0), u32(phase ^ u32(1))
        ptx.commit_copies()
        wait_copies()

    @ptx.device_function
    def wait_full(barriers, address, phase):
        """A tile has arrived, and wgmma may read it."""
        ptx.barrier_wait(barriers, address, phase)
        ptx.fence_async_shared()

    @ptx.device_function
    def release(barriers, address, lane):
        """The wgmmas of a warp have read the tile."""
        if lane == 0:
            ptx.barrier_arrive(barriers, address)

    @ptx.device_function
    def wait_for_turn(warpgroup):
        if takes_turns:
            ptx.named_barrier_sync(u32(_TURN_BARRIERS + warpgroup), u32(consumers))

    @ptx.device_function
    def pass_turn(warpgroup, last):
        """To the other warpgroup; after the last block there is no turn of the first one left."""
        if takes_turns and (not last or warpgroup == 0):
            ptx.named_barrier_arrive(u32(_TURN_BARRIERS + 1 - warpgroup), u32(consumers))

    @ptx.device_function
    def mask_block(s, last, block, lane):
        """Mask the keys of a block that rows do not see; last: the last key that row g of this warp sees."""
        if (block + 1) * key_block > last - lane // 4 + 1:
            mask(s, 0, i32(last - block * key_block), i32(lane & 3))

    @ptx.device_function
    def pack_weights(s, p):
        """Two neighbouring tiles of 8 keys are a fragment of A."""
        for i in range(weights_size):
            p[i] = ptx.pack_f16x2(s[2 * i], s[2 * i + 1])

    @ptx.device_function
    def rescale(o, rescale_0, rescale_1):
        for i in range(outs_size // 4):
            o[4 * i], o[4 * i + 1] = o[4 * i] * rescale_0, o[4 * i + 1] * rescale_0
            o[4 * i + 2], o[4 * i + 3] = o[4 * i + 2] * rescale_1, o[4 * i + 3] * rescale_1

    @ptx.device_function
    def consume(io, words, barriers, base, head, first, count, position, block, end, split, counter, active, thread):
        """The outputs of 64 queries."""
        s, o = cuda.local.array(scores_size, float32), cuda.local.array(outs_size, float32)
        p = cuda.local.array(weights_size, uint32)
        maxima, row_sums = cuda.local.array(2, float32), cuda.local.array(2, float32)
        warpgroup, lane = thread >> 7, thread & 31
        row = (thread >> 5) * 16 + (lane >> 2)
        last = position + first + row  # the last key that row g of this warp sees
        for i in range(outs_size):
            o[i] = _ZERO
        for i in range(2):
            maxima[i], row_sums[i] = MASKED, _ZERO
        q = ptx.wgmma_descriptor(base, u32(16), u32(1024)) + np.uint64(warpgroup) * first_q_words
        k_first = ptx.wgmma_descriptor(u32(base + k_start), u32(16), u32(1024))
        v_first = ptx.wgmma_descriptor(u32(base + v_start), u32(column_block_bytes), u32(1024))
        full, empty = u32(base + full_start), u32(base + empty_start)
        if warpgroup == 1:
            pass_turn(warpgroup, False)

        wait_full(barriers, full, u32(0))
        wait_for_turn(warpgroup)
        fence_scores(s)
        start_scores(s, words, q, k_first)
        ptx.wgmma_commit()
        pass_turn(warpgroup, block == end)
        wait_scores(s)
        release(barriers, empty, lane)
        mask_block(s, last, block, lane)
        softmax(s, 0, maxima, row_sums, 0)
        pack_weights(s, p)

        # `stage` is that of the block whose outputs come next, `next_stage` that of the next scores. Waiting for K
        # before `wait_outputs` keeps softmax before it: ptxas moves the wait for wgmmas up to the last branch.
        stage, phase, next_stage, next_phase = u32(0), u32(0), u32(1), u32(0)
        if block > end:
            wait_full(barriers, u32(full + 16 * next_stage), next_phase)
        while block > end:
            block -= 1
            wait_for_turn(warpgroup)
            fence_scores(s)
            start_scores(s, words, q, k_first + np.uint64(next_stage) * stage_words)
            ptx.wgmma_commit()
            wait_full(barriers, u32(full + 16 * stage + 8), phase)
            fence_outputs(o, p)  # a fence before the wait would not count: ptxas (C7519) then runs wgmmas one by one
            start_outputs(o, p, words, v_first + np.uint64(stage) * stage_words)
            ptx.wgmma_commit()
            pass_turn(warpgroup, block == end)
            wait_scores_only(s)
            release(barriers, u32(empty + 16 * next_stage), lane)
            mask_block(s, last, block, lane)
            rescale_0, rescale_1 = softmax(s, 0, maxima, row_sums, 0)
            used, stage, phase = u32(empty + 16 * stage + 8), next_stage, next_phase
            next_stage = u32(next_stage + u32(1))
            if next_stage == stages:
                next_stage, next_phase = u32(0), u32(next_phase ^ u32(1))
            if block > end:
                wait_full(barriers, u32(full + 16 * next_stage), next_phase)
            wait_outputs(o, p, s)
            release(barriers, used, lane)
            rescale(o, rescale_0, rescale_1)
            pack_weights(s, p)

        wait_full(barriers, u32(full + 16 * stage + 8), phase)
        fence_outputs(o, p)
        start_outputs(o, p, words, v_first + np.uint64(stage) * stage_words)
        ptx.wgmma_commit()
        wait_outputs(o, p, s)
        if shared_keys and active > 1:
            tile_cta = cuda.blockIdx.x - split
            if not combine_splits(io, words, o, maxima, row_sums, tile_cta, split, active, counter, thread):
                return
        store_rows(io.out, o, 0, row_sums, 0, first + row, count, head, lane & 3)

    @ptx.kernel(plan.threads, 1)
    def prefill_attention(io):
        words, barriers = cuda.shared.array(0, uint32), cuda.shared.array(0, uint64)
        thread = cuda.threadIdx.x
        base = u32((ptx.shared_address(words, 0) + u32(1023)) & u32(0xFFFFFC00))
        if thread == 0:
            for i in range(2 * stages):
                ptx.barrier_init(barriers, u32(base + full_start + 8 * i), u32(_WARPGROUP))
                ptx.barrier_init(barriers, u32(base + empty_start + 8 * i), u32(consumer_warps))
            ptx.fence_barriers()
        count, position = io.count[0], io.position[0]  # no kernel of a step writes them before its end
        cuda.syncthreads()
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        cta = cuda.blockIdx.x
        tile, head, split, counter, active, block, end = find_work(cta, cuda.gridDim.x, position, count)
        if tile < 0:
            return
        first = tile * query_tile
        if thread >= consumers:
            give_registers()
            produce(io, words, barriers, base, head, first, count, position + count, block, end, thread - consumers)
        else:
            take_registers()
            consume(io, words, barriers, base, head, first, count, position, block, end, split, counter, active, thread)

    return prefill_attention
