"""Epilogues of the persistent kernel's projections for several columns (tokens): those of `epilogue.py`, each for one
column of an entry.
"""

from typing import Any

import numpy as np
from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair, swiglu
from numba_atomflow.ops.cuda.persistent.schedule import DOWN, GATE_UP, LM_HEAD, O_PROJ, QKV, PersistentShape
from numba_atomflow.ops.cuda.persistent.wide_projection import make_row_sum
from numba_atomflow.ops.cuda.scalars import u32
from numba_atomflow.ops.cuda.token.order import sort_key

_ZERO = np.float32(0.0)


def make_load_ahead(shape: PersistentShape) -> Any:
    """Device function (kind, state, work_tile, entry, column, loaded). kind: that of `state`, as a constant where it is
    one.
    """
    half_tiles_of = shape.by_kind(lambda plan: int(plan.half_tiles))
    k_halves_of, hidden = shape.by_kind(lambda plan: int(plan.k_halves)), shape.hidden
    residual_in, residual_mid = shape.mailbox.residual_in_exact, shape.mailbox.residual_mid_exact
    exchange, own_rows = make_exchange(shape.ranks), shape.o.out_features
    load, of_model = exchange.load, exchange.of_model

    @ptx.device_function
    def load_ahead(kind, state, work_tile, entry, column, loaded):
        if kind == O_PROJ or kind == DOWN:  # noqa: SIM109 (numba makes a loop of `in`)
            own_row = (work_tile >> u32(k_halves_of(kind)) << u32(4 - half_tiles_of(kind))) + 2 * entry
            row = of_model(state.mailbox, own_row, own_rows)
            start = residual_in if kind == O_PROJ else residual_mid
            w0, w1, w2, w3 = load(state.mailbox, start + column * hidden + row)
            loaded[0], loaded[1], loaded[2], loaded[3] = w0, w1, w2, w3

    return load_ahead


def make_epilogue(shape: PersistentShape, load_ahead: Any) -> Any:
    """Device function (state, work_tile, entry, column, loaded, floats, sums)."""
    add_o, add_down = (_make_add(shape, kind, load_ahead) for kind in (O_PROJ, DOWN))
    store_qkv = _make_store_sums(shape) if shape.rope_in_attention else _make_store_qkv(shape)
    store_swiglu, store_logits = _make_store_swiglu(shape), _make_store_logits(shape)

    @ptx.device_function
    def epilogue(state, work_tile, entry, column, loaded, floats, sums):
        if state.kind == QKV:
            store_qkv(state, work_tile, entry, column, floats, sums)
        elif state.kind == O_PROJ:
            add_o(state, work_tile, entry, column, loaded, floats, sums)
        elif state.kind == GATE_UP:
            store_swiglu(state, work_tile, entry, column, floats, sums)
        elif state.kind == DOWN:
            add_down(state, work_tile, entry, column, loaded, floats, sums)
        else:
            store_logits(state, work_tile, entry, column, floats, sums)

    return epilogue


def _make_store_qkv(shape: PersistentShape) -> Any:
    """q, k and v, rotated; k and v also to the cache."""
    half, heads, kv_heads = shape.head_dim // 2, shape.heads, shape.kv_heads
    head_tiles, kv_width = shape.qkv.section_tiles, kv_heads * shape.head_dim
    q_pitch, kv_pitch = heads * half, kv_heads * half
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v
    row_sum, rope_start, publish = make_row_sum(shape, QKV), shape.rope_start, make_exchange(shape.ranks).store_own

    @ptx.large_device_function
    def store_qkv(state, tile, entry, column, floats, sums):
        low, high = row_sum(floats, sums, entry, column, _ZERO), row_sum(floats, sums, entry + 8, column, _ZERO)
        head, i = tile // head_tiles, tile % head_tiles * 8 + entry
        if head < heads + kv_heads:
            table = rope_start + column * 2 * half + i
            low, high = rope_pair(low, high, floats[table], floats[table + half])
        pair = ptx.pack_f16x2(low, high)
        if head < heads:
            publish(state.mailbox, q_start + column * q_pitch + head * half + i, pair, state.flag)
        else:
            is_key = head < heads + kv_heads
            kv_head = head - heads if is_key else head - heads - kv_heads
            word = (k_start if is_key else v_start) + column * kv_pitch + kv_head * half + i
            publish(state.mailbox, word, pair, state.flag)
            layer_start = state.keys_start if is_key else state.values_start
            element = layer_start + (state.position + column) * kv_width + kv_head * 2 * half + i
            state.cache16[element] = np.uint16(ptx.f16_bits(low))
            state.cache16[element + half] = np.uint16(ptx.f16_bits(high))

    return store_qkv


def _make_store_sums(shape: PersistentShape) -> Any:
    """q, k and v as they are projected, which attention finishes."""
    start, pitch, row_sum = shape.mailbox.q, shape.qkv.out_features, make_row_sum(shape, QKV)
    publish = make_exchange(shape.ranks).store_own

    @ptx.large_device_function
    def store_sums(state, tile, entry, column, floats, sums):
        word = start + column * pitch + tile * 16 + 2 * entry
        low, high = row_sum(floats, sums, 2 * entry, column, _ZERO), row_sum(floats, sums, 2 * entry + 1, column, _ZERO)
        publish(state.mailbox, word, ptx.f32_bits(low), state.flag)
        publish(state.mailbox, word + 1, ptx.f32_bits(high), state.flag)

    return store_sums


def _make_add(shape: PersistentShape, kind: int, load_ahead: Any) -> Any:
    """The residual stream plus the output of the o or down projection. Of the two halves of a tile along K, the first
    passes its sums on, and the second continues them.
    """
    rows, k_halves, hidden = 16 >> int(shape.plans[kind].half_tiles), shape.plans[kind].k_halves, shape.hidden
    is_o, mailbox = kind == O_PROJ, shape.mailbox
    exact = mailbox.residual_mid_exact if is_o else mailbox.residual_in_exact
    pairs = mailbox.residual_mid if is_o else mailbox.residual_in
    row_sum, sums_start, own_rows = make_row_sum(shape, kind), mailbox.down_sums, shape.o.out_features
    exchange = make_exchange(shape.ranks)
    load_own, store_own, store_pair, of_model = (
        exchange.load_own,
        exchange.store_own,
        exchange.store_pair,
        exchange.of_model,
    )

    @ptx.device_function
    def receive_sums(state, word):
        """Two sums of the first half of K."""
        w0, flag0, w1, flag1 = load_own(state.mailbox, word)
        polls = u32(0)
        while flag0 != state.flag or flag1 != state.flag:
            w0, flag0, w1, flag1 = load_own(state.mailbox, word)
            polls = u32(polls + u32(1))
            if watchdog_trips(state.watchdog, polls):
                break
        return ptx.bits_f32(w0), ptx.bits_f32(w1)

    @ptx.large_device_function
    def add(state, work_tile, entry, column, loaded, floats, sums):
        low, high = _ZERO, _ZERO
        row = of_model(state.mailbox, (work_tile >> 1 if k_halves else work_tile) * rows + 2 * entry, own_rows)
        if k_halves:
            word = sums_start + column * hidden + row
            if work_tile & 1 == 0:
                low, high = (
                    row_sum(floats, sums, 2 * entry, column, low),
                    row_sum(floats, sums, 2 * entry + 1, column, high),
                )
                store_own(state.mailbox, word, ptx.f32_bits(low), state.flag)
                store_own(state.mailbox, word + 1, ptx.f32_bits(high), state.flag)
                return
            low, high = receive_sums(state, word)
        addend_flag = state.input_flag if is_o else state.flag
        polls = u32(0)  # the words have nearly always arrived: the op's own input depends on all of them
        while loaded[1] != addend_flag or loaded[3] != addend_flag:
            load_ahead(kind, state, work_tile, entry, column, loaded)
            polls = u32(polls + u32(1))
            if watchdog_trips(state.watchdog, polls):
                break
        low = ptx.bits_f32(loaded[0]) + row_sum(floats, sums, 2 * entry, column, low)
        high = ptx.bits_f32(loaded[2]) + row_sum(floats, sums, 2 * entry + 1, column, high)
        store_pair(state.mailbox, pairs + (column * hidden + row) // 2, low, high, state.flag)
        word = exact + column * hidden + row
        store_own(state.mailbox, word, ptx.f32_bits(low), state.flag)
        store_own(state.mailbox, word + 1, ptx.f32_bits(high), state.flag)

    return add


def _make_store_swiglu(shape: PersistentShape) -> Any:
    """silu(gate) * up, two elements per thread."""
    start, pitch, own_words = shape.attn_out_words, shape.down.in_features // 2, shape.intermediate // 2
    row_sum, exchange = make_row_sum(shape, GATE_UP), make_exchange(shape.ranks)
    store_vector, of_model = exchange.store_vector, exchange.of_model

    @ptx.device_function
    def element(floats, sums, row, column):
        gate, up = row_sum(floats, sums, row, column, _ZERO), row_sum(floats, sums, row + 8, column, _ZERO)
        return swiglu(gate, up)

    @ptx.large_device_function
    def store_swiglu(state, tile, entry, column, floats, sums):
        low, high = element(floats, sums, 2 * entry, column), element(floats, sums, 2 * entry + 1, column)
        word = of_model(state.vectors.words, state.vectors.start + start + column * pitch + tile * 4 + entry, own_words)
        store_vector(state.vectors.words, word, ptx.pack_f16x2(low, high))

    return store_swiglu


def _make_store_logits(shape: PersistentShape) -> Any:
    """Logits, a row for each column, and the largest of the thread's sort keys."""
    vocabulary, own_rows = shape.vocabulary, shape.lm_head.out_features
    row_sum, exchange = make_row_sum(shape, LM_HEAD), make_exchange(shape.ranks)
    store_float, of_model = exchange.store_float, exchange.of_model

    @ptx.large_device_function
    def store_logits(state, tile, entry, column, floats, sums):
        row = of_model(state.mailbox, int64(tile * 16 + entry), own_rows)
        if row < vocabulary:
            logit = row_sum(floats, sums, entry, column, _ZERO)
            store_float(state.logits, column * vocabulary + row, logit)
            state.best[0] = max(state.best[0], sort_key(logit, row))

    return store_logits
