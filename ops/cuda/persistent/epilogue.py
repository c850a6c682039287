"""What becomes of a projection's sums in the persistent kernel: rotation and cache, residual stream, SwiGLU, logits.

Every result goes to the exchange, where the next op's readers wait for it, and to the view that the same op writes in
other ways of running a step, where a validator looks. `prepare` starts the loads that an entry needs, before its
weights are waited for.

`given`, for all of them: (exchange, epoch of what the layer read, epoch of what it makes, position, q uint16,
cache uint16, start of the layer's keys in it, start of its values, residual float32, ffn uint32 pairs of float16,
logits float32, seen uint32, penalty float32, best: the thread's own int64 [1], patience, fault).
"""

from typing import Any

import numpy as np
from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import give_up, publish_pair
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair, swiglu
from numba_atomflow.ops.cuda.persistent.projection import make_row_sum
from numba_atomflow.ops.cuda.persistent.schedule import DOWN, GATE_UP, OUT, QKV, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.token.order import penalise, sort_key


def make_prepare(shape: PersistentShape) -> Any:
    """Device function (kind, given, share, entry, ahead)."""
    rows, halved_of = shape.vocabulary.out_features, shape.picker("halved")
    entering, middle = shape.exchange["entering_exact"], shape.exchange["middle_exact"]

    @ptx.device_function
    def prepare(kind, given, share, entry, ahead):
        if kind == OUT or kind == DOWN:  # noqa: SIM109 (numba makes a loop of `in`, for every op)
            row = (share * 16 >> np.uint32(halved_of(kind))) + 2 * entry
            w0, w1, w2, w3 = ptx.ll_load(given[0], (entering if kind == OUT else middle) + row)
            ahead[0], ahead[1], ahead[2], ahead[3] = w0, w1, w2, w3
        elif kind == VOCABULARY:
            ahead[0] = given[11][min(share * 16 + entry, rows - 1) // 32]

    return prepare


def make_finish(shape: PersistentShape, prepare: Any) -> Any:
    """Device function (kind, given, share, entry, ahead, floats, sums)."""
    finish_o, finish_down = (_make_add(shape, kind, prepare) for kind in (OUT, DOWN))
    finish_qkv, finish_gate_up, finish_vocabulary = _make_qkv(shape), _make_swiglu(shape), _make_logits(shape)

    @ptx.device_function
    def finish(kind, given, share, entry, ahead, floats, sums):
        if kind == QKV:
            finish_qkv(given, share, entry, ahead, floats, sums)
        elif kind == OUT:
            finish_o(given, share, entry, ahead, floats, sums)
        elif kind == GATE_UP:
            finish_gate_up(given, share, entry, ahead, floats, sums)
        elif kind == DOWN:
            finish_down(given, share, entry, ahead, floats, sums)
        else:
            finish_vocabulary(given, share, entry, ahead, floats, sums)

    return finish


def _make_qkv(shape: PersistentShape) -> Any:
    """q, k and v, rotated; k and v also to the cache."""
    half, heads, kv_heads = shape.head_dim // 2, shape.heads, shape.kv_heads
    head_tiles, kv_width = shape.qkv.section_tiles, kv_heads * shape.head_dim
    q_start, k_start, v_start = (shape.exchange[name] for name in ("q", "k", "v"))
    row_sum, rope_start = make_row_sum(shape, QKV), shape.rope_start

    @ptx.device_function
    def put(target, start, low, high):
        target[start] = np.uint16(ptx.f16_bits(low))
        target[start + half] = np.uint16(ptx.f16_bits(high))

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):
        exchange, epoch, position, q, cache = given[0], given[2], given[3], given[4], given[5]
        low, high = row_sum(floats, sums, entry), row_sum(floats, sums, entry + 8)
        head, i = tile // head_tiles, tile % head_tiles * 8 + entry
        if head < heads + kv_heads:
            low, high = rope_pair(low, high, floats[rope_start + i], floats[rope_start + half + i])
        pair = ptx.pack_f16x2(low, high)
        if head < heads:
            ptx.ll_store(exchange, q_start + head * half + i, pair, epoch)
            put(q, head * 2 * half + i, low, high)
        else:
            is_key = head < heads + kv_heads
            kv = head - heads if is_key else head - heads - kv_heads
            ptx.ll_store(exchange, (k_start if is_key else v_start) + kv * half + i, pair, epoch)
            put(cache, (given[6] if is_key else given[7]) + position * kv_width + kv * 2 * half + i, low, high)

    return finish


def _make_add(shape: PersistentShape, kind: int, prepare: Any) -> Any:
    """The residual stream plus what "o" or "down" makes."""
    rows = 16 >> shape.sizes("halved")[kind]
    after = "middle" if kind == OUT else "entering"
    new, pairs = shape.exchange[f"{after}_exact"], shape.exchange[after]
    known = 1 if kind == OUT else 2  # which of the epochs given what is added to has
    row_sum = make_row_sum(shape, kind)

    @ptx.large_device_function
    def finish(given, share, entry, ahead, floats, sums):
        exchange, epoch, residual = given[0], given[2], given[8]
        row = share * rows + 2 * entry
        tries = np.uint32(0)  # hardly ever any: all of the words were needed to come this far
        while ahead[1] != given[known] or ahead[3] != given[known]:
            prepare(kind, given, share, entry, ahead)
            tries = np.uint32(tries + np.uint32(1))
            if give_up(given[14], given[15], tries):
                break
        low = ptx.bits_f32(ahead[0]) + row_sum(floats, sums, 2 * entry)
        high = ptx.bits_f32(ahead[2]) + row_sum(floats, sums, 2 * entry + 1)
        publish_pair(exchange, pairs + row // 2, low, high, epoch)
        ptx.ll_store(exchange, new + row, ptx.f32_bits(low), epoch)
        ptx.ll_store(exchange, new + row + 1, ptx.f32_bits(high), epoch)
        residual[row], residual[row + 1] = low, high

    return finish


def _make_swiglu(shape: PersistentShape) -> Any:
    """silu(gate) * up, two units at once."""
    start = shape.exchange["ffn"]
    row_sum = make_row_sum(shape, GATE_UP)

    @ptx.device_function
    def unit(floats, sums, row):
        return swiglu(row_sum(floats, sums, row), row_sum(floats, sums, row + 8))

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):
        pair = ptx.pack_f16x2(unit(floats, sums, 2 * entry), unit(floats, sums, 2 * entry + 1))
        ptx.ll_store(given[0], start + tile * 4 + entry, pair, given[2])
        given[9][tile * 4 + entry] = pair

    return finish


def _make_logits(shape: PersistentShape) -> Any:
    """Logits, and the largest of the thread's sort keys."""
    rows = shape.vocabulary.out_features
    row_sum = make_row_sum(shape, VOCABULARY)

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):
        logits, penalty, best = given[10], given[12], given[13]
        row = int64(tile * 16 + entry)
        if row < rows:
            logit = row_sum(floats, sums, entry)
            logits[row] = logit
            best[0] = max(best[0], sort_key(penalise(logit, ahead[0], row, penalty), row))

    return finish
