"""Views into the exchange: what lets a single op of the persistent kernel run by itself.

Whoever looks at a step op by op may change what an op reads, in the views that all ways of running a step share. Before
such an op, this kernel makes words of everything that it could wait for. It is not part of a decode step.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import publish_pair
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec

THREADS = 256
_BLOCKS = 16


class PublishArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        residual: [hidden]. q, cache: bits of float16. attn_out, intermediate: pairs of float16.
        mailbox, position, steps, plane: as in `PersistentArguments`.
        layer: whose ops may read the words; `shape.layers` for the LM head.
    """

    residual: F32
    q: U16
    cache: U16
    attn_out: U32
    intermediate: U32
    mailbox: U64
    position: I64
    steps: I64
    plane: NUMBER
    layer: NUMBER


def make_publish(shape: PersistentShape) -> Any:
    """Kernel (`PublishArguments`): the words that an op of the layer may read. Launch: any number of CTAs of `THREADS`
    threads.
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
    def publish(io):
        before = np.uint32(io.steps[0] * (layers + 1) + 1 + io.layer)
        now = np.uint32(before + np.uint32(1))
        word = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while word < most:
            if word < hidden:
                bits = ptx.f32_bits(io.residual[word])
                ptx.ll_store(io.mailbox, entering_exact + word, bits, before)
                ptx.ll_store(io.mailbox, middle_exact + word, bits, now)
            if word < hidden // 2:
                low, high = io.residual[2 * word], io.residual[2 * word + 1]
                publish_pair(io.mailbox, entering + word, low, high, before)
                publish_pair(io.mailbox, middle + word, low, high, now)
            if word < q_words:
                ptx.ll_store(io.mailbox, q_place + word, rotated(io.q, int64(0), word), now)
                ptx.ll_store(io.mailbox, attended_place + word, io.attn_out[word], now)
            if word < kv_words and io.layer < layers:
                keys = 2 * io.layer * io.plane + io.position[0] * kv_width
                ptx.ll_store(io.mailbox, k_place + word, rotated(io.cache, keys, word), now)
                ptx.ll_store(io.mailbox, v_place + word, rotated(io.cache, keys + io.plane, word), now)
            if word < ffn_words:
                ptx.ll_store(io.mailbox, ffn_place + word, io.intermediate[word], now)
            word += cuda.gridDim.x * THREADS

    return publish


def publish_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_publish`."""
    return Planned(kernel_spec("publish", make_publish, PublishArguments, THREADS, shape=shape), _BLOCKS)
