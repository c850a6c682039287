"""What becomes of a projection's sums in the persistent kernel: rotation and cache, residual stream, SwiGLU, logits.

Every result goes to the exchange, where the next op's readers wait for it, and to the view that the same op writes in other
ways of running a step, where a validator looks. `prepare` starts the loads that an entry needs, before its weights are
waited for.
"""

from typing import Any

import numpy as np
from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.exchange import publish_pair
from numba_atomflow.ops.cuda.persistent.projection import make_project, make_row_sum
from numba_atomflow.ops.cuda.persistent.shape import PersistentShape
from numba_atomflow.ops.cuda.projection import LOG2_E
from numba_atomflow.ops.cuda.sample import penalise, sort_key

_ONE = np.float32(1.0)


def make_qkv(shape: PersistentShape) -> Any:
    """q, k and v, rotated; k and v also to the cache. Given: (exchange, epoch, position, cosines, sines, q uint16, cache
    uint16, start of the layer's keys and of its values in it).
    """
    half, heads, kv_heads = shape.head_dim // 2, shape.heads, shape.kv_heads
    head_tiles, kv_width = shape.qkv.section_tiles, kv_heads * shape.head_dim
    places = shape.exchange
    q_start, k_start, v_start = places["q"], places["k"], places["v"]
    row_sum = make_row_sum(shape.qkv)

    @ptx.device_function
    def prepare(given, tile, entry, ahead):  # type: ignore[no-untyped-def]
        at = given[2] * half + tile % head_tiles * 8 + entry
        if tile // head_tiles < heads + kv_heads:
            ahead[0], ahead[1] = ptx.f32_bits(given[3][at]), ptx.f32_bits(given[4][at])

    @ptx.device_function
    def put(target, start, low, high):  # type: ignore[no-untyped-def]
        target[start] = np.uint16(ptx.f16_bits(low))
        target[start + half] = np.uint16(ptx.f16_bits(high))

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):  # type: ignore[no-untyped-def]
        exchange, epoch, position, _, _, q, cache, keys, values = given
        low, high = row_sum(floats, sums, entry), row_sum(floats, sums, entry + 8)
        head, i = tile // head_tiles, tile % head_tiles * 8 + entry
        if head < heads + kv_heads:
            cosine, sine = ptx.bits_f32(ahead[0]), ptx.bits_f32(ahead[1])
            rotated = low * cosine - high * sine
            high = high * cosine + low * sine
            low = rotated
        pair = ptx.pack_f16x2(low, high)
        if head < heads:
            ptx.publish(exchange, q_start + head * half + i, pair, epoch)
            put(q, head * 2 * half + i, low, high)
        elif head < heads + kv_heads:
            ptx.publish(exchange, k_start + (head - heads) * half + i, pair, epoch)
            put(cache, keys + position * kv_width + (head - heads) * 2 * half + i, low, high)
        else:
            ptx.publish(exchange, v_start + (head - heads - kv_heads) * half + i, pair, epoch)
            put(cache, values + position * kv_width + (head - heads - kv_heads) * 2 * half + i, low, high)

    return make_project(shape, shape.qkv, 8, prepare, finish)


def make_add(shape: PersistentShape, part: str) -> Any:
    """The residual stream plus what "o" or "down" makes. Given: (exchange, epoch of what is added to, epoch of the result,
    residual float32).
    """
    layout = shape.o if part == "o" else shape.down
    before, after = ("entering", "middle") if part == "o" else ("middle", "entering")
    places = shape.exchange
    old, new, pairs = places[f"{before}_exact"], places[f"{after}_exact"], places[after]
    row_sum = make_row_sum(layout)

    @ptx.device_function
    def prepare(given, tile, entry, ahead):  # type: ignore[no-untyped-def]
        w0, w1, w2, w3 = ptx.load_words(given[0], old + tile * 16 + 2 * entry)
        ahead[0], ahead[1], ahead[2], ahead[3] = w0, w1, w2, w3

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):  # type: ignore[no-untyped-def]
        exchange, known, epoch, residual = given
        row = tile * 16 + 2 * entry
        while ahead[1] != known or ahead[3] != known:  # hardly ever: all of it was needed to come this far
            prepare(given, tile, entry, ahead)
        low = ptx.bits_f32(ahead[0]) + row_sum(floats, sums, 2 * entry)
        high = ptx.bits_f32(ahead[2]) + row_sum(floats, sums, 2 * entry + 1)
        publish_pair(exchange, pairs + row // 2, low, high, epoch)
        ptx.publish(exchange, new + row, ptx.f32_bits(low), epoch)
        ptx.publish(exchange, new + row + 1, ptx.f32_bits(high), epoch)
        residual[row], residual[row + 1] = low, high

    return make_project(shape, layout, 8, prepare, finish)


def make_swiglu(shape: PersistentShape) -> Any:
    """silu(gate) * up. Given: (exchange, epoch, ffn uint32 pairs of float16)."""
    start = shape.exchange["ffn"]
    row_sum = make_row_sum(shape.gate_up)

    @ptx.device_function
    def prepare(given, tile, entry, ahead):  # type: ignore[no-untyped-def]
        pass

    @ptx.device_function
    def unit(floats, sums, row):  # type: ignore[no-untyped-def]
        gate, up = row_sum(floats, sums, row), row_sum(floats, sums, row + 8)
        return gate * (_ONE / (_ONE + ptx.exp2(-gate * LOG2_E))) * up

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):  # type: ignore[no-untyped-def]
        exchange, epoch, ffn = given
        pair = ptx.pack_f16x2(unit(floats, sums, 2 * entry), unit(floats, sums, 2 * entry + 1))
        ptx.publish(exchange, start + tile * 4 + entry, pair, epoch)
        ffn[tile * 4 + entry] = pair

    return make_project(shape, shape.gate_up, 4, prepare, finish)


def make_logits(shape: PersistentShape) -> Any:
    """Logits, and the largest of the thread's sort keys. Given: (logits float32, seen uint32, penalty float32, best: the
    thread's own int64 [1]).
    """
    layout = shape.vocabulary
    rows = layout.rows
    row_sum = make_row_sum(layout)

    @ptx.device_function
    def prepare(given, tile, entry, ahead):  # type: ignore[no-untyped-def]
        ahead[0] = given[1][min(tile * 16 + entry, rows - 1) // 32]

    @ptx.large_device_function
    def finish(given, tile, entry, ahead, floats, sums):  # type: ignore[no-untyped-def]
        logits, _, penalty, best = given
        row = int64(tile * 16 + entry)
        if row < rows:
            logit = row_sum(floats, sums, entry)
            logits[row] = logit
            best[0] = max(best[0], sort_key(penalise(logit, ahead[0], row, penalty), row))

    return make_project(shape, layout, 16, prepare, finish)
