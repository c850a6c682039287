"""Inter-CTA results without barriers, in the style of NCCL's LL protocol.

A word of the mailbox is 8 bytes: 4 of data and 4 of flag, written by one `st.relaxed.gpu.b64` and polled by
`ld.relaxed.gpu.b64`. 8-byte accesses are single-copy atomic in PTX's memory model ("morally strong" operations of 8
bytes do not tear), so a matching flag implies the data. Nothing else is ever inferred from a flag: neither of another
word nor of other memory. So there is no barrier and no fence between the ops of a step; a word takes one write to L2
and one read from there. Price: twice the bytes.

The flag is an epoch, numbered by step and layer: steps completed * (layers + 1) + 1 + layer. Stale words carry the
epoch of the layer before or of the step before, as every step writes every word (except those of KV splits that it does
not need, whose epochs have 32 bits); an epoch returns after 2^32 layers (2^16 for pairs).

Why a word is never overwritten before all have read it. Every buffer is written once per layer. A CTA that writes the
words of layer i + 1 has computed them from all results of the op before, each of which was computed from all results of
the op before that, and so on around the layer: also from the results of every CTA that read the words of layer i, and
their values depend on that reading. For such a reader to see the later word, a value would have to depend on itself
through reads and dependencies: PTX's no-thin-air axiom forbids that. A CTA without a work tile in an op does not read
its input at all, so it need not be waited for. That a word's two writes, by different CTAs, come in this order for
every reader is more than the axioms say of relaxed accesses; on these chips a word has one location of coherence, in
L2. If it were otherwise, a reader would miss its epoch and its watchdog would trip; it would never take a wrong result.

The buffers that validators read are written beside the mailbox by plain stores, which nothing orders between ops; two
writes of the same element are at least an op apart, and within a step nothing reads them.

Kinds of words: a float32 with a flag of 32 bits; two float16 with a flag of 32 bits; and, for the residual stream,
which its readers round to float16 after normalising it, two float32 rounded to 24 bits each with a flag of 16 bits.
"""

from typing import Any, NamedTuple

import numpy as np

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import u32

SPIN_LIMIT = 1 << 21  # polls of a word or barrier (a second or more) before the watchdog trips


class Watchdog(NamedTuple):
    """What ends a wait that would last for ever.

    Attributes:
        limit: the thread's own uint32 [1]: `SPIN_LIMIT`; 0 once the watchdog has tripped.
        fault: int32 [1] in device memory, set for the host.
    """

    limit: Any
    fault: Any


@ptx.device_function
def watchdog_trips(watchdog, polls):
    """Whether to stop waiting after so many polls; then the thread waits for nothing else either."""
    if polls <= watchdog.limit[0]:
        return False
    watchdog.limit[0] = u32(0)
    watchdog.fault[0] = np.int32(1)
    return True


@ptx.device_function
def round_to_24_bits(value):
    """A float32 rounded to its upper 24 bits; NaN stays NaN."""
    bits = u32(ptx.f32_bits(value))
    magnitude = min(u32((bits & u32(0x7FFFFFFF)) + u32(0x80)), u32(0x7FFFFFFF))
    return u32((magnitude >> u32(8)) | (bits >> u32(31)) << u32(23))


@ptx.device_function
def pack_pair(low, high, flag):
    """Two float32, rounded to 24 bits, with 16 bits of the flag: both halves of a word."""
    a, b = round_to_24_bits(low), round_to_24_bits(high)
    first = u32(a | (b & u32(0xFF)) << u32(24))
    second = u32((b >> u32(8)) | (flag & u32(0xFFFF)) << u32(16))
    return first, second


@ptx.device_function
def ll_store_pair(mailbox, index, low, high, flag):
    """The word of `pack_pair`."""
    first, second = pack_pair(low, high, flag)
    ptx.ll_store(mailbox, index, first, second)


@ptx.device_function
def unpack_pair(first, second):
    """The two float32 of a word that `ll_store_pair` wrote."""
    low = ptx.bits_f32(u32(first << u32(8)))
    high = ptx.bits_f32(u32((first >> u32(24)) << u32(8) | (second & u32(0xFFFF)) << u32(16)))
    return low, high


@ptx.device_function
def has_pair_flag(second, flag):
    """Whether the upper half of a word of `ll_store_pair` carries this flag."""
    return (second >> u32(16)) == (flag & u32(0xFFFF))
