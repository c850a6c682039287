"""The inputs of `o` and `down` of a step of several tokens, which every CTA reads whole: without flags.

A flagged word (`comm/flagged.py`) takes twice the bytes of its data, and what all CTAs read together comes at the rate
of L2. So these vectors are plain float16 with memory of their own for every layer, which holds `ABSENT` when the step
begins: NaNs with all bits set, which no conversion to float16 gives (PTX's `cvt` makes 0x7FFF of every NaN). A reader
polls until none of the four 32-bit words of its load is `ABSENT`.

Why that is correct. Within a step each word is written once, by one relaxed store of 32 bits, which does not tear. The
memory is there twice, for steps of even and of odd number: a step sets that of the next one to `ABSENT`, and writes and
reads its own; what a step has read of a word is therefore `ABSENT`, which the end of the launch before made visible, or
this step's result. Nothing is inferred of another word, and no order of two results matters, so there is no fence. A
step always writes every word, also one whose watchdog tripped. A step that did not end leaves both halves unknown: the
host then sets them to `ABSENT` (`PersistentStep.reset`), as it does before the first step.

Several GPUs. Each has a copy for all columns and all of the model's elements; a word is stored to every copy, with
system scope, and each GPU polls, and clears, its own copy. A clear must come after the last store and the last load of
the step before, and before the first store of the step after:

- Half h is written and read in step n. In step n + 1, which uses the other half, its GPU clears it. No peer's store of
  step n comes later: it comes before a fence of system scope and the count of the peer's CTA, these before the peer's
  key, and every GPU awaits all keys before its step n ends (`wide_rank.py`). The GPU's own loads of step n have ended
  with its launch.
- A peer stores into h again in step n + 2, which it begins when its step n + 1 has ended, after the key of this GPU.
  All CTAs of this GPU have cleared their part before that key: each by plain stores, then a barrier of its consumer
  warps, a fence of system scope by one of their threads, and the count that the last CTA reads before it sends the key.

So a peer may be one step ahead at most, in the half that this GPU does not clear in its own step: what it stores there
before this GPU's step begins is a result of that step, and is found when it begins. Parity is that of steps of this
number of columns, which all GPUs count alike.
"""

from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_THREADS, PersistentShape
from numba_atomflow.ops.cuda.scalars import i32, u32

ABSENT = 0xFFFFFFFF
_ABSENT = u32(ABSENT)


class LayerVectors(NamedTuple):
    """Of a layer, for every column: attn_out, then intermediate, in pairs of float16.

    Attributes:
        words: of all layers, [2, layers, shape.vector_words]; with several GPUs the `RankArrays` of them.
        start: word at which this layer's begin.
    """

    words: Any
    start: Any


@ptx.device_function
def all_arrived(w0, w1, w2, w3):
    """Whether none of four words is `ABSENT`."""
    return w0 != _ABSENT and w1 != _ABSENT and w2 != _ABSENT and w3 != _ABSENT


def make_clear_layer(shape: PersistentShape) -> Any:
    """Device function (words, start, thread): set a layer's words, from `start` on, to `ABSENT`; each CTA a part."""
    quads = shape.vector_words // 4

    @ptx.device_function
    def clear_layer(words, start, thread):
        quad = i32(i32(cuda.blockIdx.x) * CONSUMER_THREADS + thread)
        while quad < quads:
            ptx.store_16(words, start + 4 * quad, _ABSENT, _ABSENT, _ABSENT, _ABSENT)
            quad = i32(quad + i32(cuda.gridDim.x) * CONSUMER_THREADS)

    return clear_layer
