"""Mailbox words from the buffers of a step: what lets a single op of the persistent kernel run by itself.

Validators that run a step op by op may change the buffers that an op reads, which all ways of running a step share.
Before such an op, this kernel writes the words that it could poll for. It is not part of a decode step.
"""

from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import ll_store_pair
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import u32

THREADS = 256
_CTAS = 16


class PublishArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        residual: [hidden]. q, cache: bits of float16. attn_out, intermediate: pairs of float16.
        mailbox, position, steps, kv_stride: as in `PersistentArguments`.
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
    kv_stride: NUMBER
    layer: NUMBER


def make_publish(shape: PersistentShape) -> Any:
    """Kernel (`PublishArguments`). Launch: any number of CTAs of `THREADS` threads."""
    layers, hidden, half = shape.layers, shape.hidden, shape.head_dim // 2
    q_words, kv_words = shape.heads * half, shape.kv_heads * half
    intermediate_words, kv_width = shape.intermediate // 2, shape.kv_heads * shape.head_dim
    offsets = shape.mailbox
    residual_in, residual_in_exact = offsets.residual_in, offsets.residual_in_exact
    residual_mid, residual_mid_exact = offsets.residual_mid, offsets.residual_mid_exact
    q_start, k_start, v_start = offsets.q, offsets.k, offsets.v
    attn_out_start, intermediate_start = offsets.attn_out, offsets.intermediate
    words = max(hidden, q_words, intermediate_words)

    @ptx.device_function
    def packed_pair(array, start, word):
        index = start + word // half * 2 * half + word % half
        return u32(u32(array[index]) | u32(array[index + half]) << u32(16))

    @ptx.kernel(THREADS, 1)
    def publish(io):
        input_flag = u32(io.steps[0] * (layers + 1) + 1 + io.layer)
        flag = u32(input_flag + u32(1))
        word = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while word < words:
            if word < hidden:
                bits = ptx.f32_bits(io.residual[word])
                ptx.ll_store(io.mailbox, residual_in_exact + word, bits, input_flag)
                ptx.ll_store(io.mailbox, residual_mid_exact + word, bits, flag)
            if word < hidden // 2:
                low, high = io.residual[2 * word], io.residual[2 * word + 1]
                ll_store_pair(io.mailbox, residual_in + word, low, high, input_flag)
                ll_store_pair(io.mailbox, residual_mid + word, low, high, flag)
            if word < q_words:
                ptx.ll_store(io.mailbox, q_start + word, packed_pair(io.q, int64(0), word), flag)
                ptx.ll_store(io.mailbox, attn_out_start + word, io.attn_out[word], flag)
            if word < kv_words and io.layer < layers:
                keys = 2 * io.layer * io.kv_stride + io.position[0] * kv_width
                ptx.ll_store(io.mailbox, k_start + word, packed_pair(io.cache, keys, word), flag)
                ptx.ll_store(io.mailbox, v_start + word, packed_pair(io.cache, keys + io.kv_stride, word), flag)
            if word < intermediate_words:
                ptx.ll_store(io.mailbox, intermediate_start + word, io.intermediate[word], flag)
            word += cuda.gridDim.x * THREADS

    return publish


def publish_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_publish`."""
    return Planned(kernel_spec("publish", make_publish, PublishArguments, THREADS, shape=shape), _CTAS)
