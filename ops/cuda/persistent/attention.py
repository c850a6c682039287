"""Attention of the persistent kernel: one token's heads over the cache, by as many blocks as the sequence is worth.

A block takes a key/value head and a chunk of the sequence, as in `ops/cuda/attention/decode.py`, whose fragments it
shares; with one token, the heads that share a key/value head fill at most 8 rows of a fragment, and the other 8 are
left out. What differs is the way of the newest key and value: they come with q through the exchange, and the first
chunk's block adds them as one more sum. So all keys that are read from the cache were written by earlier launches, and
the first ones are loaded before q is there.

Chunks are added up by the blocks that made them: each takes its share of the result's elements, a lane for each chunk.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import make_combine
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.comm.flagged import give_up
from numba_atomflow.ops.cuda.persistent.schedule import (
    ALONE,
    CONSUMERS,
    KEYS,
    MOST_QUERIES,
    STEP_KEYS,
    THREADS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import meet
from numba_atomflow.ops.cuda.persistent.trace import STAGED

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def make_share(shape: PersistentShape) -> Any:
    """Device function (position) -> the block's key/value head, its chunk's number, keys per chunk, chunks in all."""
    splits = shape.splits

    @ptx.device_function
    def share(position):
        chunk = ((position + splits - 1) // splits + KEYS - 1) // KEYS * KEYS
        chunk = max(chunk, ALONE if position <= ALONE else STEP_KEYS)
        active = max((position + chunk - 1) // chunk, 1)
        block = np.int32(cuda.blockIdx.x)
        return np.int32(block // splits), np.int32(block % splits), np.int32(chunk), np.int32(active)

    return share


def _make_team(lanes: int) -> tuple[Any, Any]:
    """Device functions (x) -> the largest x, and the sum of x, over neighbouring lanes: a power of two of them."""
    steps = lanes.bit_length() - 1

    @ptx.device_function
    def team_max(x):
        for step in range(steps):
            x = max(x, ptx.shuffle_xor_f32(x, lanes // 2 >> step))
        return x

    @ptx.device_function
    def team_sum(x):
        for step in range(steps):
            x += ptx.shuffle_xor_f32(x, lanes // 2 >> step)
        return x

    return team_max, team_sum


def make_attend(shape: PersistentShape, note: Any) -> Any:
    """Device function (exchange, epoch, position, part, cached, attended, thread, shared, patience, fault, times, op).

    Args of it: part, from `make_share`; cached: the cache, uint32 pairs of float16, and the words at which the layer's
    keys and values begin; attended uint32, where a validator looks; shared: views of shared memory.

    Args:
        note: from `trace.make_note`.
    """
    head_dim, ratio, splits, kv_heads = shape.head_dim, shape.ratio, shape.splits, shape.kv_heads
    head_words, kv_row = head_dim // 2, shape.kv_heads * head_dim // 2
    half = head_dim // 2
    fragments = make_head_fragments(head_dim)
    wide, narrow = fragments.wide, fragments.narrow
    row_registers, per_key = fragments.row_registers, fragments.value_registers
    load_row, load_value, element = fragments.load_row, fragments.load_value, fragments.element
    k_registers, v_registers = 2 * row_registers, 4 * per_key
    softmax_step = make_softmax_step(per_key, half_tile=True)
    sum_registers = head_dim // 4
    pitch, parts = shape.query_pitch, shape.sum_parts
    x_start = shape.x_start
    token_start = x_start + MOST_QUERIES * pitch  # the newest key, then its value: head_dim halves each
    sums_start = token_start + head_dim
    stats_start = sums_start + parts * ratio * head_dim
    combine = make_combine(head_dim, ratio, sums_start, stats_start)
    quads, pairs = ratio * head_dim // 4, ratio * head_dim // 2
    team = 16 if splits <= 16 else 32  # lanes that add up the chunks of a pair
    _, warp_sum = _make_team(32)
    team_max, team_sum = _make_team(team)
    places = shape.exchange
    q_place, k_place, v_place = places["q"], places["k"], places["v"]
    sum_place, stat_place, out_place = places["sums"], places["stats"], places["attended"]
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))

    @ptx.device_function
    def load_keys(cache, start, base, last, kv, g, t, k_part):
        """A lane's part of the keys of one step; the last key stands for those behind it."""
        for h in range(2):
            key = min(np.int32(base + h * 8 + g), last)
            load_row(cache, start + np.int32(key * kv_row + kv * head_words), t, k_part, h * row_registers)

    @ptx.device_function
    def load_values(cache, start, base, last, kv, g, t, v_part):
        for i in range(4):
            key = min(np.int32(base + 2 * t + i % 2 + i // 2 * 8), last)
            load_value(cache, start + np.int32(key * kv_row + kv * head_words), g, v_part, i * per_key)

    @ptx.large_device_function
    def receive(exchange, place, epoch, patience, fault, out):
        """Two words of the exchange, when they are there."""
        tries = np.uint32(0)
        waiting = True
        while waiting:
            w0, e0, w1, e1 = ptx.ll_load(exchange, place)
            out[0], out[1] = w0, w1
            tries = np.uint32(tries + np.uint32(1))
            waiting = e0 != epoch or e1 != epoch
            if waiting and give_up(patience, fault, tries):
                waiting = False

    @ptx.device_function
    def spread(halves, start, i, pair):
        """A pair of elements that RoPE rotated together, to their places in a head."""
        halves[start + i] = np.uint16(pair & np.uint32(0xFFFF))
        halves[start + i + half] = np.uint16(pair >> np.uint32(16))

    @ptx.large_device_function
    def take_token(exchange, epoch, kv, newest, thread, halves, patience, fault):
        """q of the block's heads and, in the first chunk's block, the newest key and value, to shared memory."""
        got = cuda.local.array(2, uint32)
        q_loads, kv_loads = ratio * half // 2, half // 2
        entry = thread
        while entry < q_loads + (2 * kv_loads if newest else 0):
            if entry < q_loads:
                word = 2 * entry
                receive(exchange, q_place + kv * ratio * half + word, epoch, patience, fault, got)
                start = 2 * (x_start + word // half * pitch)
            else:
                other = entry - q_loads
                word = 2 * (other % kv_loads)
                place = k_place if other < kv_loads else v_place
                receive(exchange, place + kv * half + word, epoch, patience, fault, got)
                start = 2 * token_start + (0 if other < kv_loads else head_dim)
            spread(halves, start, word % half, got[0])
            spread(halves, start, word % half + 1, got[1])
            entry += THREADS

    @ptx.large_device_function
    def add_newest(lane, warp, words, floats):
        """The newest key's score and value, as a sum of their own: a warp for each head."""
        row = warp
        while row < ratio:
            dot = _ZERO
            word = lane
            while word < head_words:
                a, b = ptx.unpack_f16x2(words[x_start + row * pitch + word])
                c, d = ptx.unpack_f16x2(words[token_start + word])
                dot += a * c + b * d
                e, f = ptx.unpack_f16x2(words[token_start + head_words + word])
                at = sums_start + (CONSUMERS * ratio + row) * head_dim + 2 * word
                floats[at], floats[at + 1] = e, f
                word += 32
            dot = warp_sum(dot)
            if lane == 0:
                at = stats_start + (CONSUMERS * ratio + row) * 2
                floats[at], floats[at + 1] = dot * scale, np.float32(1.0)
            row += CONSUMERS

    @ptx.device_function
    def put(exchange, epoch, attended, kv, pair, low, high):
        """Two elements of the result."""
        word = ptx.pack_f16x2(low, high)
        ptx.ll_store(exchange, out_place + kv * pairs + pair, word, epoch)
        attended[kv * pairs + pair] = word

    @ptx.device_function
    def receive_both(exchange, place, other, epoch, patience, fault, out):
        """Two words of the exchange each from two places, asked for together."""
        tries = np.uint32(0)
        waiting = True
        while waiting:
            w0, e0, w1, e1 = ptx.ll_load(exchange, place)
            w2, e2, w3, e3 = ptx.ll_load(exchange, other)
            out[0], out[1], out[2], out[3] = w0, w1, w2, w3
            tries = np.uint32(tries + np.uint32(1))
            waiting = e0 != epoch or e1 != epoch or e2 != epoch or e3 != epoch
            if waiting and give_up(patience, fault, tries):
                waiting = False

    @ptx.large_device_function
    def add_chunks(exchange, epoch, attended, kv, split, active, thread, patience, fault):
        """The block's share of adding up the chunks: every `active`-th pair, by a team with a lane for each chunk."""
        got = cuda.local.array(4, uint32)
        lane = thread % team
        chunk = min(lane, np.int32(active - 1))
        warp_pair = split + active * (thread // 32 * (32 // team))  # of the warp's first team
        while warp_pair < pairs:
            # All lanes of a warp must come to the shuffles: a team without a pair repeats the last one.
            own = warp_pair + active * (thread % 32 // team)
            pair = min(own, pairs - 1)
            row, d = pair // head_words, pair % head_words * 2
            unit = (kv * splits + chunk) * ratio + row
            receive_both(exchange, stat_place + unit * 2, sum_place + unit * head_dim + d, epoch, patience, fault, got)
            peak, total = ptx.bits_f32(got[0]), ptx.bits_f32(got[1])
            highest = team_max(peak)
            weight = ptx.exp2(peak - highest) if lane < active else _ZERO
            whole = team_sum(total * weight)
            low = team_sum(ptx.bits_f32(got[2]) * weight)
            high = team_sum(ptx.bits_f32(got[3]) * weight)
            if lane == 0 and own < pairs:
                put(exchange, epoch, attended, kv, pair, low / whole, high / whole)
            warp_pair += active * (THREADS // team)

    @ptx.large_device_function
    def attend(exchange, epoch, position, part, cached, attended, thread, shared, patience, fault, times, op):
        kv, split, chunk, active = part
        cache, key_start, value_start = cached
        words, halves, floats = shared[0], shared[1], shared[2]
        q_part = cuda.local.array(4, uint32)
        k_part = cuda.local.array(k_registers, uint32)
        v_part = cuda.local.array(v_registers, uint32)
        sums = cuda.local.array(sum_registers, float32)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        if kv < kv_heads and split < active:
            end = min(position, np.int32((split + 1) * chunk))
            base = np.int32(split * chunk + warp * KEYS)
            last = np.int32(end - 1)
            if base < end:
                load_keys(cache, key_start, base, last, kv, g, t, k_part)
                load_values(cache, value_start, base, last, kv, g, t, v_part)
            take_token(exchange, epoch, kv, split == 0, thread, halves, patience, fault)
            meet()
            if thread == 0:
                note(times, op, STAGED)
            for i in range(sum_registers):
                sums[i] = _ZERO
            running_max, row_sum = LOWEST, _ZERO
            while base < end:
                following = np.int32(base + STEP_KEYS)
                s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
                s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO
                q_row = x_start + min(g, ratio - 1) * pitch
                for c in range(wide + narrow):
                    if c < wide:
                        a0, a1, a2, a3 = ptx.load_shared_16(words, q_row + c * 16 + t * 4)
                        q_part[0], q_part[1], q_part[2], q_part[3] = a0, a1, a2, a3
                    else:
                        a0, a1 = ptx.load_8(words, q_row + wide * 16 + t * 2)
                        q_part[0], q_part[1] = a0, a1
                    for i in range(2 if c < wide else 1):
                        a0, a2, none = q_part[2 * i], q_part[2 * i + 1], np.uint32(0)
                        at = 4 * c + 2 * i
                        b0, b1 = k_part[at], k_part[at + 1]
                        s0, s1, s2, s3 = ptx.mma(a0, none, a2, none, b0, b1, s0, s1, s2, s3)
                        b0, b1 = k_part[row_registers + at], k_part[row_registers + at + 1]
                        s4, s5, s6, s7 = ptx.mma(a0, none, a2, none, b0, b1, s4, s5, s6, s7)
                # The next keys are on their way while softmax and values are done, the next values after that.
                if following < end:
                    load_keys(cache, key_start, following, last, kv, g, t, k_part)
                key = base + 2 * t
                s0 = s0 * scale if key < end else LOWEST
                s1 = s1 * scale if key + 1 < end else LOWEST
                s4 = s4 * scale if key + 8 < end else LOWEST
                s5 = s5 * scale if key + 9 < end else LOWEST
                scores = s0, s1, _ZERO, _ZERO, s4, s5, _ZERO, _ZERO
                running_max, _, row_sum, _ = softmax_step(running_max, LOWEST, row_sum, _ZERO, scores, v_part, sums)
                if following < end:
                    load_values(cache, value_start, following, last, kv, g, t, v_part)
                base = following

            # The warps' sums, and that of the newest key, meet in shared memory.
            row_sum = quad_sum(row_sum)
            if g < ratio:
                for j in range(sum_registers // 2):
                    for column in range(2):
                        at = sums_start + (warp * ratio + g) * head_dim + element(t, column, j)
                        floats[at] = sums[2 * j + column]
                if t == 0:
                    at = stats_start + (warp * ratio + g) * 2
                    floats[at], floats[at + 1] = running_max, row_sum
            if split == 0:
                add_newest(lane, warp, words, floats)
            meet()
            entry = thread
            while entry < quads:
                row, d = entry // (head_dim // 4), entry % (head_dim // 4) * 4
                if split == 0:  # two numbers that the compiler knows: it takes the sums side by side
                    peak, whole, o0, o1, o2, o3 = combine(floats, parts, row, d)
                else:
                    peak, whole, o0, o1, o2, o3 = combine(floats, CONSUMERS, row, d)
                if active == 1:
                    inverse = _ONE / whole
                    put(exchange, epoch, attended, kv, entry * 2, o0 * inverse, o1 * inverse)
                    put(exchange, epoch, attended, kv, entry * 2 + 1, o2 * inverse, o3 * inverse)
                else:
                    unit = (kv * splits + split) * ratio + row
                    at = sum_place + unit * head_dim + d
                    ptx.ll_store(exchange, at, ptx.f32_bits(o0), epoch)
                    ptx.ll_store(exchange, at + 1, ptx.f32_bits(o1), epoch)
                    ptx.ll_store(exchange, at + 2, ptx.f32_bits(o2), epoch)
                    ptx.ll_store(exchange, at + 3, ptx.f32_bits(o3), epoch)
                    if d == 0:
                        ptx.ll_store(exchange, stat_place + unit * 2, ptx.f32_bits(peak), epoch)
                        ptx.ll_store(exchange, stat_place + unit * 2 + 1, ptx.f32_bits(whole), epoch)
                entry += THREADS
            if active > 1:
                add_chunks(exchange, epoch, attended, kv, split, active, thread, patience, fault)
            meet()

    return attend
