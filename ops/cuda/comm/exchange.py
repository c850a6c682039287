"""Words of the mailbox between the CTAs of one GPU, or of several that share a model.

With several GPUs (ranks) each has a mailbox of its own, with room for the results of all. A CTA stores a result to its
own and to every peer's mailbox, over NVLink, and polls its own only. q, k, v and the partial results of KV splits stay
on their rank. The other ranks' accesses have system scope: PTX's memory model wants a scope that contains both threads.

`comm/flagged.py` has the argument why a word is never overwritten before all have read it. It holds for each copy of a
word by itself. Each has its home in the memory of the GPU that polls it, and a layer's results depend, through what is
exchanged, on every reader of every rank: a rank's heads reach all through its part of `attn_out`, its units of the MLP
through its part of `intermediate`. A row of a projection belongs to one rank for good, so that a word's two writes come
from one GPU over one link, and the first has been read before the second can be computed. Words that are copied to a
rank that does not read them may arrive in any order.

Between two steps ranks wait for each other (`persistent/rank.py`): the next step's embedding overwrites words that a
slower rank might still read.
"""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import ll_store_pair, pack_pair

MAX_PEERS = 7  # of a rank


class RankArrays(NamedTuple):
    """The same array on every rank.

    Attributes:
        rank: number of this one. own: its array. peer_1 ...: those of the others; as many as there are are valid.
    """

    rank: Any
    own: Any
    peer_1: Any
    peer_2: Any
    peer_3: Any
    peer_4: Any
    peer_5: Any
    peer_6: Any
    peer_7: Any


class Exchange(NamedTuple):
    """Device functions. `words` is the mailbox of one GPU, or with several GPUs the `RankArrays` of them; `vectors`
    likewise, of words without flags (`persistent/wide_vectors.py`).

    Attributes:
        load: (words, index) -> two words as `ptx.ll_load`, which other ranks may be writing.
        load_own: the same of words that this GPU alone writes.
        load_vector: (vectors, index) -> four words as `ptx.load_relaxed_16`, which other ranks may be writing.
        store: (words, index, low, high): a word that every rank reads.
        store_own: a word that only this GPU reads.
        store_pair: (words, index, low, high, flag): as `flagged.ll_store_pair`, a word that every rank reads.
        store_vector: (vectors, index, value): a word of 32 bits that every rank reads.
        store_float: (arrays, index, value): a float32 for every rank, of the logits.
        of_model: (words, index, count) -> index among all ranks' of what has this index among the `count` of a rank.
        of_columns: (words, index, column, count) -> the same where every column has `count` of a rank, one column after
            the other: index counts those of the columns before, too.
    """

    load: Any
    load_own: Any
    load_vector: Any
    store: Any
    store_own: Any
    store_pair: Any
    store_vector: Any
    store_float: Any
    of_model: Any
    of_columns: Any


def make_exchange(ranks: int) -> Exchange:
    """The functions for so many GPUs."""
    return _of_one_gpu() if ranks == 1 else _of_ranks(ranks)


def _of_one_gpu() -> Exchange:
    @ptx.device_function
    def of_model(words, index, count):
        return index

    @ptx.device_function
    def of_columns(words, index, column, count):
        return index

    return Exchange(
        load=ptx.ll_load,
        load_own=ptx.ll_load,
        load_vector=ptx.load_relaxed_16,
        store=ptx.ll_store,
        store_own=ptx.ll_store,
        store_pair=ll_store_pair,
        store_vector=ptx.store_relaxed_u32,
        store_float=_put,
        of_model=of_model,
        of_columns=of_columns,
    )


@ptx.device_function
def _put(array, index, value):
    array[index] = value


def _of_ranks(ranks: int) -> Exchange:
    @ptx.device_function
    def load(words, index):
        return ptx.ll_load_sys(words.own, index)

    @ptx.device_function
    def load_own(words, index):
        return ptx.ll_load(words.own, index)

    @ptx.device_function
    def load_vector(vectors, index):
        return ptx.load_relaxed_16_sys(vectors.own, index)

    @ptx.device_function
    def store_own(words, index, low, high):
        ptx.ll_store(words.own, index, low, high)

    @ptx.device_function
    def store(words, index, low, high):
        ptx.ll_store_sys(words.own, index, low, high)
        ptx.ll_store_sys(words.peer_1, index, low, high)
        if ranks > 2:
            ptx.ll_store_sys(words.peer_2, index, low, high)
        if ranks > 3:
            ptx.ll_store_sys(words.peer_3, index, low, high)
        if ranks > 4:
            ptx.ll_store_sys(words.peer_4, index, low, high)
        if ranks > 5:
            ptx.ll_store_sys(words.peer_5, index, low, high)
        if ranks > 6:
            ptx.ll_store_sys(words.peer_6, index, low, high)
        if ranks > 7:
            ptx.ll_store_sys(words.peer_7, index, low, high)

    @ptx.device_function
    def store_pair(words, index, low, high, flag):
        first, second = pack_pair(low, high, flag)
        store(words, index, first, second)

    @ptx.device_function
    def of_model(words, index, count):
        return index + words.rank * count

    @ptx.device_function
    def of_columns(words, index, column, count):
        return index + (column * (ranks - 1) + words.rank) * count

    return Exchange(
        load=load,
        load_own=load_own,
        load_vector=load_vector,
        store=store,
        store_own=store_own,
        store_pair=store_pair,
        store_vector=_to_all(ranks, ptx.store_relaxed_u32_sys),
        store_float=_to_all(ranks, _put),
        of_model=of_model,
        of_columns=of_columns,
    )


def _to_all(ranks: int, put: Any) -> Any:
    """Device function (arrays, index, value): put it into every rank's array.

    Args:
        put: device function (array, index, value).
    """

    @ptx.device_function
    def to_all(arrays, index, value):
        put(arrays.own, index, value)
        put(arrays.peer_1, index, value)
        if ranks > 2:
            put(arrays.peer_2, index, value)
        if ranks > 3:
            put(arrays.peer_3, index, value)
        if ranks > 4:
            put(arrays.peer_4, index, value)
        if ranks > 5:
            put(arrays.peer_5, index, value)
        if ranks > 6:
            put(arrays.peer_6, index, value)
        if ranks > 7:
            put(arrays.peer_7, index, value)

    return to_all
