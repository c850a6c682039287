"""Views into the exchange: what lets a single op of the persistent kernel run by itself.

Whoever looks at a step op by op may change what an op reads, in the views that all ways of running a step share. Before
such an op, this kernel makes words of everything that it could wait for. It is not part of a decode step.
"""

from typing import Any

import numpy as np
from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import publish_pair
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec

THREADS = 256
_BLOCKS = 16


def make_publish(shape: PersistentShape) -> Any:
    """Kernel (residual float32 [hidden]; q and cache uint16; attended and ffn uint32 pairs of float16; exchange uint64;
    position int64 [1]; steps int64 [2]; plane: elements of a layer's keys; layer, or `shape.layers` for the
    vocabulary): the words that an op of the layer may read. Launch: any number of blocks of `THREADS` threads.
    """
    layers, hidden, half = shape.layers, shape.hidden, shape.head_dim // 2
    q_words, kv_words = shape.heads * half, shape.kv_heads * half
    ffn_words, kv_width = shape.ffn // 2, shape.kv_heads * shape.head_dim
    places = shape.exchange
    entering, entering_exact = places["entering"], places["entering_exact"]
    middle, middle_exact = places["middle"], places["middle_exact"]
    q_place, k_place, v_place = places["q"], places["k"], places["v"]
    attended_place, ffn_place = places["attended"], places["ffn"]
    most = max(hidden, q_words, ffn_words)

    @ptx.device_function
    def rotated(array, start, word):
        at = start + word // half * 2 * half + word % half
        return np.uint32(np.uint32(array[at]) | np.uint32(array[at + half]) << np.uint32(16))

    @ptx.kernel(THREADS, 1)
    def publish(residual, q, cache, attended, ffn, exchange, position, steps, plane, layer):
        before = np.uint32(steps[0] * (layers + 1) + 1 + layer)
        now = np.uint32(before + np.uint32(1))
        word = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while word < most:
            if word < hidden:
                bits = ptx.f32_bits(residual[word])
                ptx.publish(exchange, entering_exact + word, bits, before)
                ptx.publish(exchange, middle_exact + word, bits, now)
            if word < hidden // 2:
                low, high = residual[2 * word], residual[2 * word + 1]
                publish_pair(exchange, entering + word, low, high, before)
                publish_pair(exchange, middle + word, low, high, now)
            if word < q_words:
                ptx.publish(exchange, q_place + word, rotated(q, int64(0), word), now)
                ptx.publish(exchange, attended_place + word, attended[word], now)
            if word < kv_words and layer < layers:
                keys = 2 * layer * plane + position[0] * kv_width
                ptx.publish(exchange, k_place + word, rotated(cache, keys, word), now)
                ptx.publish(exchange, v_place + word, rotated(cache, keys + plane, word), now)
            if word < ffn_words:
                ptx.publish(exchange, ffn_place + word, ffn[word], now)
            word += cuda.gridDim.x * THREADS

    return publish


def publish_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_publish`."""
    signature = (F32, U16, U16, U32, U32, U64, I64, I64, NUMBER, NUMBER)
    return Planned(kernel_spec("publish", make_publish, signature, THREADS, shape=shape), _BLOCKS)
