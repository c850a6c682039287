"""How blocks hand results to each other within a launch: every word says by itself whether it is there.

A word has 8 bytes: a result, and the epoch in which it was made. It is written by one store and read by one load of 8
bytes, relaxed, at GPU scope. PTX's memory model makes such accesses single-copy atomic ("morally strong" operations of
8 bytes do not tear): who reads the epoch that it waits for has the result that was stored with it. Nothing else is ever
inferred from an epoch: neither of another word nor of other memory. So there is no barrier between the ops of a step,
no fence, and no flag; a word takes one write to the second-level cache and one read from there.

Why a word is never overwritten before all have read it. Every buffer is written once per layer. Whoever writes the
words of layer i + 1 has computed them from all results of the op before, each of which was computed from all results of
the op before that, and so on around the layer: also from the results of every block that read the words of layer i, and
their values depend on that reading. For such a reader to see the later word, a value would have to depend on itself
through reads and dependencies: PTX's no-thin-air axiom forbids that. A block that has no work in an op does not read
its input at all, and so nobody needs to wait for it. That a word's two writes, by different blocks, come in this order
for every reader is more than the axioms say of relaxed accesses; on these chips a word has one home, in the
second-level cache. Were it otherwise, a reader would miss its epoch and give up; it would never take a wrong result.

Epochs are numbered by step and layer: the steps made so far times (layers + 1), plus 1, plus the layer. Stale words are
of the layer before or of the step before, as every step writes every word (but those of chunks of the sequence that it
does not need, whose epochs have 32 bits); the number returns after 2^32 layers (2^16 for pairs).

The views that validators read are written beside it by plain stores, which nothing orders between ops; they lie an op
apart, and within a step nothing reads them.

Kinds of words: float32 with an epoch of 32 bits; two float16 with an epoch of 32 bits; and, for the residual stream,
whose readers round it to float16 after they have normalised it, a pair of float32 cut to 24 bits each with an epoch of
16 bits.
"""

import numpy as np

from numba_atomflow.ops import ptx

PATIENCE = 1 << 21  # looks at a word or a barrier (a second or more) before a block gives up


@ptx.device_function
def cut_24(value):
    """A float32 rounded to its upper 24 bits; NaN stays NaN."""
    bits = np.uint32(ptx.f32_bits(value))
    magnitude = min(np.uint32((bits & np.uint32(0x7FFFFFFF)) + np.uint32(0x80)), np.uint32(0x7FFFFFFF))
    return np.uint32((magnitude >> np.uint32(8)) | (bits >> np.uint32(31)) << np.uint32(23))


@ptx.device_function
def publish_pair(exchange, index, low, high, epoch):
    """Two float32, cut to 24 bits."""
    a, b = cut_24(low), cut_24(high)
    first = np.uint32(a | (b & np.uint32(0xFF)) << np.uint32(24))
    second = np.uint32((b >> np.uint32(8)) | (epoch & np.uint32(0xFFFF)) << np.uint32(16))
    ptx.ll_store(exchange, index, first, second)


@ptx.device_function
def pair_of(first, second):
    """The two float32 of a word that `publish_pair` wrote."""
    low = ptx.bits_f32(np.uint32(first << np.uint32(8)))
    high = ptx.bits_f32(
        np.uint32((first >> np.uint32(24)) << np.uint32(8) | (second & np.uint32(0xFFFF)) << np.uint32(16))
    )
    return low, high


@ptx.device_function
def is_pair_of(second, epoch):
    """Whether the upper half of a word says that the pair is of this epoch."""
    return (second >> np.uint32(16)) == (epoch & np.uint32(0xFFFF))


@ptx.device_function
def give_up(patience, fault, tries):
    """Whether to stop waiting after so many looks; then nothing is waited for any more, and the host will know."""
    if tries <= patience[0]:
        return False
    patience[0] = np.uint32(0)
    fault[0] = np.int32(1)
    return True
