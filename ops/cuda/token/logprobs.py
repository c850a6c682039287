"""Log-probabilities of a step's token on the device: the most likely tokens, the chosen one, and the log-sum-exp.

They are of the logits as they are, before penalty, temperature and filters (`numba_atomflow/logprobs.py`, which is the
reference). A record of `RECORD_WORDS` integers goes to a ring in pinned host memory, before the step's last kernel
posts the token: the host reads it once it has the token, and no logits are copied. Sort keys (`order.py`) carry a token
and its logit; the sum of exponentials is in units of 2^-44 of the most likely token's, an integer: neither depends on
the order of threads.

1. One pass over the logits: each thread keeps its largest key. The `MOST`-th largest of these is a lower bound for the
   `MOST`-th largest of all, since so many threads have a key at or above it.
2. A second pass adds up exponentials, counts tokens before the chosen one, and lists those at or above the bound. They
   belong to `MOST` threads at most, which bounds the list; of real logits they are some thirty.
3. Each listed token counts those before it: its place.

Cost model: one CTA makes 2 passes over the logits, predicted 5-8 us each for 128,256 tokens, and 20 maxima over the CTA
of some 0.3 us: 16-22 us, 1-2 % of a 3B model's step. Otherwise 4 * V bytes go to the host for each token, and no step
is launched before the host has chosen.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, LOWEST_KEY, sort_key, token_id, warp_max_key

THREADS = 1024
MOST = 20  # tokens in a record
RECORD_WORDS = 3 + MOST
LOGPROB_RING = 16  # records; more than steps whose records the host has not read yet

_UNITS = 2.0**44
_SUM, _RANK, _CHOSEN, _TOP = range(4)  # words of a record; the last is the first of `MOST` keys
_LEAST_DISTANCE = f32(-31.0)  # from the largest logit: below it the exponential is less than one unit


class LogprobsArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        logits: [V].
        token: [1], the chosen token.
        tokens_posted: [1], before this one: the record's place in the ring.
        records: [ring * RECORD_WORDS] in pinned host memory.
    """

    logits: F32
    token: I32
    tokens_posted: I64
    records: I64


class Record(NamedTuple):
    """What the kernel says of a token.

    Attributes:
        token, logit, rank: of the chosen token; its rank from 1.
        log_sum_exp: of the logits.
        top: the most likely tokens and their logits, in order of rank; `MOST` of them, or the whole vocabulary.
    """

    token: int
    logit: float
    rank: int
    log_sum_exp: float
    top: list[tuple[int, float]]


def read_record(words: NDArray[np.int64]) -> Record:
    """A record as the kernel has written it, int64 [RECORD_WORDS]."""
    top = [_token_and_logit(int(key)) for key in words[_TOP:] if key != LOWEST_KEY]
    log_sum_exp = top[0][1] + math.log(int(words[_SUM]) / _UNITS)
    return Record(*_token_and_logit(int(words[_CHOSEN])), int(words[_RANK]), log_sum_exp, top)


def _token_and_logit(key: int) -> tuple[int, float]:
    """The inverse of `order.sort_key`."""
    rank = key >> ID_BITS
    bits = rank - 0x80000000 if rank >= 0x80000000 else 0x80000000 | (0x7FFFFFFF - rank)
    return ID_MASK - (key & ID_MASK), float(np.array([bits], np.uint32).view(np.float32)[0])


def logprobs_shared_bytes(vocabulary: int, threads: int) -> int:
    """Dynamic shared memory: maxima of the warps, scalars, and as many keys as may be listed."""
    return 8 * (threads // 32 + 3 + _listed(vocabulary, threads))


def _listed(vocabulary: int, threads: int) -> int:
    return MOST * -(-vocabulary // threads)


def make_logprobs(vocabulary: int, *, ring: int, threads: int = THREADS, dependent: bool = False) -> Any:
    """Kernel (`LogprobsArguments`): the record of the chosen token.

    Launch: one CTA of `threads` threads, whole warps, with `logprobs_shared_bytes(vocabulary, threads)`.

    Args:
        ring: records of the ring.
    """
    warps = threads // 32
    total, before_chosen, list_size, keys_start = (warps + i for i in range(4))

    @ptx.device_function
    def largest_of_all(shared, key, thread):
        """The largest key of the CTA's threads."""
        key = warp_max_key(key)
        if thread & 31 == 0:
            shared[thread // 32] = key
        cuda.syncthreads()
        lane = thread & 31
        key = warp_max_key(shared[lane] if lane < warps else int64(LOWEST_KEY))
        cuda.syncthreads()
        return key

    @ptx.kernel(threads, 1)
    def logprobs(io):
        shared = cuda.shared.array(0, int64)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        thread = cuda.threadIdx.x
        record = (io.tokens_posted[0] % ring) * RECORD_WORDS
        chosen = int64(io.token[0])
        chosen_key = sort_key(io.logits[chosen], chosen)
        if thread < 3:
            shared[total + thread] = 0

        own = int64(LOWEST_KEY)
        token = int64(thread)
        while token < vocabulary:
            own = max(own, sort_key(io.logits[token], token))
            token += threads
        most_likely, bound = int64(LOWEST_KEY), int64(LOWEST_KEY)
        for place in range(MOST):
            bound = largest_of_all(shared, own, thread)
            if place == 0:
                most_likely = bound
            if own == bound:
                own = int64(LOWEST_KEY)

        largest = io.logits[token_id(most_likely)]
        mass, before = int64(0), int64(0)
        token = int64(thread)
        while token < vocabulary:
            logit = io.logits[token]
            key = sort_key(logit, token)
            distance = logit - largest
            if distance > _LEAST_DISTANCE:  # false for NaN
                mass += int64(f32(math.exp(distance)) * f32(_UNITS))
            if key > chosen_key:
                before += 1
            if key >= bound:
                shared[keys_start + cuda.atomic.add(shared, list_size, 1)] = key
            token += threads
        cuda.atomic.add(shared, total, mass)
        cuda.atomic.add(shared, before_chosen, before)
        cuda.syncthreads()

        size = shared[list_size]
        entry = int64(thread)
        while entry < size:
            key, place = shared[keys_start + entry], int64(0)
            for i in range(size):
                if shared[keys_start + i] > key:
                    place += 1
            if place < MOST:
                io.records[record + _TOP + place] = key
            entry += threads
        if thread >= size and thread < MOST:  # the vocabulary has fewer
            io.records[record + _TOP + thread] = LOWEST_KEY
        if thread == 0:
            io.records[record + _SUM] = shared[total]
            io.records[record + _RANK] = shared[before_chosen] + 1
            io.records[record + _CHOSEN] = chosen_key
        cuda.threadfence_system()

    return logprobs


def logprobs_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_logprobs`."""
    options = {"vocabulary": vocabulary, "ring": LOGPROB_RING, "dependent": dependent}
    shared_bytes = logprobs_shared_bytes(vocabulary, THREADS)
    return Planned(kernel_spec("logprobs", make_logprobs, LogprobsArguments, THREADS, shared_bytes, **options), 1)
