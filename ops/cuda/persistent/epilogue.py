"""Epilogues of the persistent kernel's projections: RoPE and KV cache, residual add, SwiGLU, logits and arg-max.

Every result goes to the mailbox, where the readers of the next op poll for it, and to the buffer that the same op
writes when a step runs as a graph, for validators. `load_ahead` issues the loads that an entry needs before the wait
for its weights.
"""

from typing import Any

import numpy as np
from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair, swiglu
from numba_atomflow.ops.cuda.persistent.projection import make_row_sum
from numba_atomflow.ops.cuda.persistent.schedule import DOWN, GATE_UP, LM_HEAD, O_PROJ, QKV, PersistentShape
from numba_atomflow.ops.cuda.scalars import u32
from numba_atomflow.ops.cuda.token.order import penalise, sort_key


def make_load_ahead(shape: PersistentShape) -> Any:
    """Device function (kind, state, work_tile, entry, loaded). kind: that of `state`, as a constant where it is one."""
    vocabulary, half_tiles_of = shape.vocabulary, shape.by_kind(lambda plan: int(plan.half_tiles))
    exchange, added_rows, logit_rows = make_exchange(shape.ranks), shape.o.out_features, shape.lm_head.out_features
    load, of_model = exchange.load, exchange.of_model
    residual_in, residual_mid = shape.mailbox.residual_in_exact, shape.mailbox.residual_mid_exact

    @ptx.device_function
    def load_ahead(kind, state, work_tile, entry, loaded):
        if kind == O_PROJ or kind == DOWN:  # noqa: SIM109 (numba makes a loop of `in`)
            row = of_model(state.mailbox, (work_tile * 16 >> u32(half_tiles_of(kind))) + 2 * entry, added_rows)
            start = residual_in if kind == O_PROJ else residual_mid
            w0, w1, w2, w3 = load(state.mailbox, start + row)
            loaded[0], loaded[1], loaded[2], loaded[3] = w0, w1, w2, w3
        elif kind == LM_HEAD:
            row = of_model(state.mailbox, work_tile * 16 + entry, logit_rows)
            loaded[0] = state.seen[min(row, vocabulary - 1) // 32]

    return load_ahead


def make_epilogue(shape: PersistentShape, load_ahead: Any) -> Any:
    """Device function (state, work_tile, entry, loaded, floats, sums)."""
    add_o, add_down = (_make_add(shape, kind, load_ahead) for kind in (O_PROJ, DOWN))
    store_qkv = _make_store_sums(shape) if shape.rope_in_attention else _make_store_qkv(shape)
    store_swiglu, store_logits = _make_store_swiglu(shape), _make_store_logits(shape)

    @ptx.device_function
    def epilogue(state, work_tile, entry, loaded, floats, sums):
        if state.kind == QKV:
            store_qkv(state, work_tile, entry, loaded, floats, sums)
        elif state.kind == O_PROJ:
            add_o(state, work_tile, entry, loaded, floats, sums)
        elif state.kind == GATE_UP:
            store_swiglu(state, work_tile, entry, loaded, floats, sums)
        elif state.kind == DOWN:
            add_down(state, work_tile, entry, loaded, floats, sums)
        else:
            store_logits(state, work_tile, entry, loaded, floats, sums)

    return epilogue


def _make_store_qkv(shape: PersistentShape) -> Any:
    """q, k and v, rotated; k and v also to the cache."""
    half, heads, kv_heads = shape.head_dim // 2, shape.heads, shape.kv_heads
    head_tiles, kv_width = shape.qkv.section_tiles, kv_heads * shape.head_dim
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v
    row_sum, rope_start = make_row_sum(shape, QKV), shape.rope_start
    publish = make_exchange(shape.ranks).store_own

    @ptx.device_function
    def store(target, start, low, high):
        target[start] = np.uint16(ptx.f16_bits(low))
        target[start + half] = np.uint16(ptx.f16_bits(high))

    @ptx.large_device_function
    def store_qkv(state, tile, entry, loaded, floats, sums):
        low, high = row_sum(floats, sums, entry), row_sum(floats, sums, entry + 8)
        head, i = tile // head_tiles, tile % head_tiles * 8 + entry
        if head < heads + kv_heads:
            low, high = rope_pair(low, high, floats[rope_start + i], floats[rope_start + half + i])
        pair = ptx.pack_f16x2(low, high)
        if head < heads:
            publish(state.mailbox, q_start + head * half + i, pair, state.flag)
            store(state.q, head * 2 * half + i, low, high)
        else:
            is_key = head < heads + kv_heads
            kv_head = head - heads if is_key else head - heads - kv_heads
            publish(state.mailbox, (k_start if is_key else v_start) + kv_head * half + i, pair, state.flag)
            layer_start = state.keys_start if is_key else state.values_start
            store(state.cache16, layer_start + state.position * kv_width + kv_head * 2 * half + i, low, high)

    return store_qkv


def _make_store_sums(shape: PersistentShape) -> Any:
    """q, k and v as they are projected, which attention finishes."""
    start, row_sum, publish = shape.mailbox.q, make_row_sum(shape, QKV), make_exchange(shape.ranks).store_own

    @ptx.large_device_function
    def store_sums(state, tile, entry, loaded, floats, sums):
        word = start + tile * 16 + 2 * entry
        low, high = row_sum(floats, sums, 2 * entry), row_sum(floats, sums, 2 * entry + 1)
        publish(state.mailbox, word, ptx.f32_bits(low), state.flag)
        publish(state.mailbox, word + 1, ptx.f32_bits(high), state.flag)

    return store_sums


def _make_add(shape: PersistentShape, kind: int, load_ahead: Any) -> Any:
    """The residual stream plus the output of the o or down projection."""
    rows = 16 >> int(shape.plans[kind].half_tiles)
    is_o, mailbox = kind == O_PROJ, shape.mailbox
    exact = mailbox.residual_mid_exact if is_o else mailbox.residual_in_exact
    pairs = mailbox.residual_mid if is_o else mailbox.residual_in
    row_sum, own_rows = make_row_sum(shape, kind), shape.o.out_features
    exchange = make_exchange(shape.ranks)
    store_pair, store_own, of_model = exchange.store_pair, exchange.store_own, exchange.of_model

    @ptx.large_device_function
    def add(state, work_tile, entry, loaded, floats, sums):
        row = of_model(state.mailbox, work_tile * rows + 2 * entry, own_rows)
        addend_flag = state.input_flag if is_o else state.flag
        polls = u32(0)  # the words have nearly always arrived: the op's own input depends on all of them
        while loaded[1] != addend_flag or loaded[3] != addend_flag:
            load_ahead(kind, state, work_tile, entry, loaded)
            polls = u32(polls + u32(1))
            if watchdog_trips(state.watchdog, polls):
                break
        low = ptx.bits_f32(loaded[0]) + row_sum(floats, sums, 2 * entry)
        high = ptx.bits_f32(loaded[2]) + row_sum(floats, sums, 2 * entry + 1)
        store_pair(state.mailbox, pairs + row // 2, low, high, state.flag)
        store_own(state.mailbox, exact + row, ptx.f32_bits(low), state.flag)
        store_own(state.mailbox, exact + row + 1, ptx.f32_bits(high), state.flag)
        state.residual[row], state.residual[row + 1] = low, high

    return add


def _make_store_swiglu(shape: PersistentShape) -> Any:
    """silu(gate) * up, two elements per thread."""
    start, own_words = shape.mailbox.intermediate, shape.intermediate // 2
    row_sum, exchange = make_row_sum(shape, GATE_UP), make_exchange(shape.ranks)
    publish, of_model = exchange.store, exchange.of_model

    @ptx.device_function
    def element(floats, sums, row):
        return swiglu(row_sum(floats, sums, row), row_sum(floats, sums, row + 8))

    @ptx.large_device_function
    def store_swiglu(state, tile, entry, loaded, floats, sums):
        pair = ptx.pack_f16x2(element(floats, sums, 2 * entry), element(floats, sums, 2 * entry + 1))
        publish(state.mailbox, of_model(state.mailbox, start + tile * 4 + entry, own_words), pair, state.flag)
        state.intermediate[tile * 4 + entry] = pair

    return store_swiglu


def _make_store_logits(shape: PersistentShape) -> Any:
    """Logits, and the largest of the thread's sort keys."""
    vocabulary, own_rows = shape.vocabulary, shape.lm_head.out_features
    row_sum, exchange = make_row_sum(shape, LM_HEAD), make_exchange(shape.ranks)
    store_float, of_model = exchange.store_float, exchange.of_model

    @ptx.large_device_function
    def store_logits(state, tile, entry, loaded, floats, sums):
        row = of_model(state.mailbox, int64(tile * 16 + entry), own_rows)
        if row < vocabulary:
            logit = row_sum(floats, sums, entry)
            store_float(state.logits, row, logit)
            state.best[0] = max(state.best[0], sort_key(penalise(logit, loaded[0], row, state.penalty), row))

    return store_logits
