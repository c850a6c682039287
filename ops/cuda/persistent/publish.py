"""Mailbox words from the buffers of a step: what lets a single op of the persistent kernel run by itself.

Validators that run a step op by op may change the buffers that an op reads, which all ways of running a step share.
Before such an op, this kernel writes the words that it could poll for. It is not part of a decode step. With several
GPUs each rank writes what it has: the words that every rank reads to all of them.
"""

from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.persistent.rank import mailboxes_of
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


class RankPublishArguments(NamedTuple):
    """The kernel's parameter on a rank. Fields are those of `PublishArguments` but these:

    Attributes:
        residual: [hidden], of which the rank's rows are read. q, cache, attn_out, intermediate: the rank's part.
        mailbox_1 ..., rank, steps_back: as in `RankArguments`.
    """

    residual: F32
    q: U16
    cache: U16
    attn_out: U32
    intermediate: U32
    mailbox: U64
    position: I64
    steps: I64
    mailbox_1: U64
    mailbox_2: U64
    mailbox_3: U64
    mailbox_4: U64
    mailbox_5: U64
    mailbox_6: U64
    mailbox_7: U64
    kv_stride: NUMBER
    layer: NUMBER
    rank: NUMBER
    steps_back: NUMBER


def make_publish(shape: PersistentShape) -> Any:
    """Kernel (`PublishArguments`, or with `shape.rank` `RankPublishArguments`). Launch: any number of CTAs of `THREADS`
    threads.
    """
    layers, rows, half = shape.layers, shape.hidden // shape.ranks, shape.head_dim // 2
    q_words, kv_words = shape.heads * half, shape.kv_heads * half
    intermediate_words, kv_width = shape.intermediate // 2, shape.kv_heads * shape.head_dim
    offsets = shape.mailbox
    residual_in, residual_in_exact = offsets.residual_in, offsets.residual_in_exact
    residual_mid, residual_mid_exact = offsets.residual_mid, offsets.residual_mid_exact
    attn_out_start, intermediate_start = offsets.attn_out, offsets.intermediate
    words = max(rows, q_words, intermediate_words)
    mailbox_of, step_of = _one_gpu() if shape.rank is None else _rank()
    exchange = make_exchange(shape.ranks)
    store, store_own, store_pair, of_model = exchange.store, exchange.store_own, exchange.store_pair, exchange.of_model
    publish_q, publish_kv = (_make_sums if shape.rope_in_attention else _make_pairs)(shape, store_own)

    @ptx.kernel(THREADS, 1)
    def publish(io):
        mailbox = mailbox_of(io)
        input_flag = u32(step_of(io) * (layers + 1) + 1 + io.layer)
        flag = u32(input_flag + u32(1))
        word = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while word < words:
            if word < rows:
                row = of_model(mailbox, word, rows)
                bits = ptx.f32_bits(io.residual[row])
                store_own(mailbox, residual_in_exact + row, bits, input_flag)
                store_own(mailbox, residual_mid_exact + row, bits, flag)
            if word < rows // 2:
                pair = of_model(mailbox, word, rows // 2)
                low, high = io.residual[2 * pair], io.residual[2 * pair + 1]
                store_pair(mailbox, residual_in + pair, low, high, input_flag)
                store_pair(mailbox, residual_mid + pair, low, high, flag)
            if word < q_words:
                publish_q(io, mailbox, word, flag)
                store(mailbox, attn_out_start + of_model(mailbox, word, q_words), io.attn_out[word], flag)
            if word < kv_words and io.layer < layers:
                keys = 2 * io.layer * io.kv_stride + io.position[0] * kv_width
                publish_kv(io, mailbox, word, keys, flag)
            if word < intermediate_words:
                place = intermediate_start + of_model(mailbox, word, intermediate_words)
                store(mailbox, place, io.intermediate[word], flag)
            word += cuda.gridDim.x * THREADS

    return publish


def _one_gpu() -> tuple[Any, Any]:
    """Device functions (io): the mailbox, and the number of steps before the one that the words are of."""

    @ptx.device_function
    def mailbox_of(io):
        return io.mailbox

    @ptx.device_function
    def step_of(io):
        return io.steps[0]

    return mailbox_of, step_of


def _rank() -> tuple[Any, Any]:
    """The same of a rank."""

    @ptx.device_function
    def step_of(io):
        return io.steps[0] - io.steps_back

    return mailboxes_of, step_of


def _make_pairs(shape: PersistentShape, store_own: Any) -> tuple[Any, Any]:
    """Device functions (io, mailbox, word, flag) and (io, mailbox, word, keys, flag): pair number `word` of q, and
    those of the token's key and value. keys: element of the cache at which the key begins.
    """
    half, q_start, k_start, v_start = shape.head_dim // 2, shape.mailbox.q, shape.mailbox.k, shape.mailbox.v

    @ptx.device_function
    def packed_pair(array, start, word):
        index = start + word // half * 2 * half + word % half
        return u32(u32(array[index]) | u32(array[index + half]) << u32(16))

    @ptx.device_function
    def publish_q(io, mailbox, word, flag):
        store_own(mailbox, q_start + word, packed_pair(io.q, int64(0), word), flag)

    @ptx.device_function
    def publish_kv(io, mailbox, word, keys, flag):
        store_own(mailbox, k_start + word, packed_pair(io.cache, keys, word), flag)
        store_own(mailbox, v_start + word, packed_pair(io.cache, keys + io.kv_stride, word), flag)

    return publish_q, publish_kv


def _make_sums(shape: PersistentShape, store_own: Any) -> tuple[Any, Any]:
    """The same where attention finishes q, k and v: two elements each, as float32. The results of KV splits that an
    earlier launch of the same step has left lose their flag: attention is part of two ops then, and waits for its own.
    """
    q_start, q_width, kv_width = shape.mailbox.q, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stats_start, stats_words = shape.mailbox.softmax_stats, shape.kv_splits * shape.heads * 2

    @ptx.device_function
    def store_both(mailbox, start, array, element, flag):
        for i in range(2):
            value, _ = ptx.unpack_f16x2(u32(array[element + i]))
            store_own(mailbox, start + i, ptx.f32_bits(value), flag)

    @ptx.device_function
    def publish_q(io, mailbox, word, flag):
        store_both(mailbox, q_start + 2 * word, io.q, 2 * word, flag)
        stale = word
        while stale < stats_words:
            store_own(mailbox, stats_start + stale, u32(0), u32(flag - u32(1)))
            stale += q_width // 2

    @ptx.device_function
    def publish_kv(io, mailbox, word, keys, flag):
        start = q_start + q_width + 2 * word
        store_both(mailbox, start, io.cache, keys + 2 * word, flag)
        store_both(mailbox, start + kv_width, io.cache, keys + io.kv_stride + 2 * word, flag)

    return publish_q, publish_kv


def publish_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_publish`."""
    signature = PublishArguments if shape.rank is None else RankPublishArguments
    return Planned(kernel_spec("publish", make_publish, signature, THREADS, shape=shape), _CTAS)
