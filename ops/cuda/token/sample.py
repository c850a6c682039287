"""The next token, chosen on the device: arg-max, sampling, and the step's bookkeeping.

`numba_atomflow/sampling.py` says what the options mean. They are read from device memory, and so is the state of the
random generator: one captured graph serves every request.

Order. A token's rank is an integer, `key`: the logit's bits made monotone (NaN on top, as in NumPy's arg-max), then
the complement of the id, so that the lower id wins a tie. The arg-max is the largest key: an atomic maximum, the same
in whatever order blocks arrive.

Sampling. What the filters keep is always the first few tokens in that order, and so all that is needed of a filter is
the probability mass that it keeps; the mass kept by all is the least of them. Mass is counted in units of 2^-44 of the
most likely token's: integers, whose sums do not depend on the order in which atomics add them. Tokens below one
unit are never drawn. One pass makes a histogram of mass and number over 2,048 bins of the logit. Finding a place in
the order (the k-th token; where the mass reaches p; where the random number falls) takes the bin from the histogram
and ranks the bin's tokens among themselves. Should they be more than fit into shared memory (equal logits), digits
of the key narrow them down first. Without filters the order is that of the ids.

Cost model: arg-max 4 * V bytes by the whole chip, 3-4 us. Sampling is one block: 2 passes over the logits without
filters, up to 4 with, predicted 5-8 us each for 128,256 tokens: 12-30 us, 1-3 % of a 3B model's step.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, NUMBER, U32, U64, Planned, kernel_spec

ARGMAX_THREADS = 256
_ARGMAX_BLOCKS = 2  # per multiprocessor
SAMPLE_THREADS = 1024
BINS, CAPACITY = 2048, 512  # of the histogram; of the list of tokens that are ranked among themselves
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY = range(5)  # places in `options`, float64 [5]
LOWEST_KEY = -1  # what `best` holds before the arg-max

_ID_BITS = 24
_ID_MASK = (1 << _ID_BITS) - 1
_NAN_RANK = 0xFFFFFFFF  # above infinity's
_INFINITE = (0x80000000 + 0x7F800000) << _ID_BITS  # the least key of a logit that is infinite or no number
BROKEN_KEY = _NAN_RANK << _ID_BITS | _ID_MASK  # of token 0, its logit no number
_UNIT = float(2**44)
_DIGIT_BITS, _DIGITS = 8, 256
_KEY_BITS = 32 + _ID_BITS
_STRIDE = 32  # bins that one thread adds up
_BINS_PER_TEMPERATURE = np.float32(64.0)  # 2,048 bins reach down to e^-32, below one unit


def token_of(best: int) -> int | None:
    """The token that an arg-max's key stands for; None if its logit is infinite or no number."""
    return None if best >= _INFINITE else _ID_MASK - (best & _ID_MASK)


@ptx.device_function
def rank(logit):
    """The logit as an integer of 32 bits in the same order; NaN on top, -0 equal to 0."""
    bits = int64(ptx.f32_bits(logit + np.float32(0.0)))
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return int64(_NAN_RANK)
    return 0x7FFFFFFF - magnitude if bits != magnitude else 0x80000000 + magnitude


@ptx.device_function
def penalise(logit, seen, token, penalty):
    """A token's logit after the repetition penalty; `seen`: the word of the bitmap that has its bit."""
    if (int64(seen) >> (token % 32)) & 1:
        logit = logit / penalty if logit > np.float32(0.0) else logit * penalty
    return logit


@ptx.device_function
def penalised(logits, seen, token, penalty):
    """The token's logit after the repetition penalty."""
    return penalise(logits[token], seen[token // 32], token, penalty)


@ptx.device_function
def sort_key(logit, token):
    """A token's place in the order: the largest key wins the arg-max."""
    return rank(logit) << _ID_BITS | (_ID_MASK - token)


@ptx.device_function
def shuffle_max(key):
    """The largest key of the warp's lanes; `LOWEST_KEY` for none."""
    for step in range(5):
        high = int64(ptx.shuffle_xor_u32((key >> 31) & 0xFFFFFFFF, 16 >> step))
        low = int64(ptx.shuffle_xor_u32(key & 0x7FFFFFFF, 16 >> step))
        other = int64(LOWEST_KEY) if high == 0xFFFFFFFF else high << 31 | low
        key = max(key, other)
    return key


@ptx.device_function
def token_id(best):
    """The token of a sort key."""
    return _ID_MASK - (best & _ID_MASK)


def make_argmax(vocabulary: int, *, dependent: bool = False) -> Any:
    """best[0] = max(best[0], key of every token). `best` must hold `LOWEST_KEY` before.

    Kernel (logits float32 [V], seen uint32 bitmap [ceil(V / 32)], options float64 [5], best int64 [1]).
    Launch: any number of blocks of `ARGMAX_THREADS` threads, no shared memory.
    """

    @ptx.kernel(ARGMAX_THREADS, 4)
    def argmax(logits, seen, options, best):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        thread = cuda.threadIdx.x
        penalty = np.float32(options[PENALTY])
        largest = int64(LOWEST_KEY)
        token = cuda.blockIdx.x * ARGMAX_THREADS + thread
        while token < vocabulary:
            largest = max(largest, sort_key(penalised(logits, seen, token, penalty), token))
            token += cuda.gridDim.x * ARGMAX_THREADS
        largest = shuffle_max(largest)
        if thread & 31 == 0:
            cuda.atomic.max(best, 0, largest)

    return argmax


def argmax_kernel(vocabulary: int, sms: int, dependent: bool) -> Planned:
    """The kernel of `make_argmax`."""
    signature, options = (F32, U32, F64, I64), {"vocabulary": vocabulary, "dependent": dependent}
    spec = kernel_spec("argmax", make_argmax, signature, ARGMAX_THREADS, **options)
    return Planned(spec, min(-(-vocabulary // ARGMAX_THREADS), _ARGMAX_BLOCKS * sms))


def sample_shared_bytes(bins: int, capacity: int) -> int:
    """Dynamic shared memory of the sampling kernel: two histograms, digits, a list of tokens, scalars."""
    return 8 * (2 * bins + 2 * _DIGITS + 2 * bins // _STRIDE + 2 * capacity + 8)


def make_sample(
    vocabulary: int,
    *,
    threads: int = SAMPLE_THREADS,
    bins: int = BINS,
    capacity: int = CAPACITY,
    dependent: bool = False,
) -> Any:
    """token[0] = the next token; a draw is counted.

    Kernel (logits float32 [V], seen uint32 [ceil(V / 32)], options float64 [5], generator uint64 [2] with seed and
    number of draws, best int64 [1] from the arg-max, token int32 [1]).
    Launch: one block of `threads` threads with `sample_shared_bytes(bins, capacity)` of dynamic shared memory.

    Args:
        bins: of the histogram, a multiple of 32. capacity: tokens that are ranked in shared memory.
    """
    counts_start, digits_start = bins, 2 * bins
    digit_counts_start = digits_start + _DIGITS
    strides_start = digit_counts_start + _DIGITS
    keys_start = strides_start + 2 * bins // _STRIDE
    masses_start = keys_start + capacity
    scalars = masses_start + capacity
    found_mass, found_count, place, listed, min_p_mass, chosen, reached = (scalars + i for i in range(7))
    id_shift = max(0, (vocabulary - 1).bit_length() - bins.bit_length() + 1)  # ids fall into bins in their own order
    last_bin = bins - 1

    @ptx.device_function
    def measure(logits, seen, token, penalty, most_likely, temperature, by_id):
        """Bin, key and mass of a token."""
        logit = penalised(logits, seen, token, penalty)
        order = int64(0) if by_id else rank(logit) << _ID_BITS
        key = order | (_ID_MASK - token)
        distance = (most_likely - logit) * (_BINS_PER_TEMPERATURE / np.float32(temperature))
        near = distance < np.float32(last_bin)  # NaN and -infinity go to the last bin, without mass
        nearness = int64(distance) if near else int64(last_bin)
        place_in_order = token >> id_shift if by_id else nearness
        exponent = float(logit) / temperature - float(most_likely) / temperature
        mass = int64(math.exp(exponent) * _UNIT) if exponent > -40.0 else int64(0)
        return place_in_order, key, mass

    @ptx.device_function
    def choose_place(shared, masses, counts, size, need, by_count):
        """The first of `size` entries at which what stands in front and what it holds reach `need`; thread 0 only.

        found_mass and found_count grow by what stands in front of it.
        """
        for i in range(size):
            in_front = shared[found_count] if by_count else shared[found_mass]
            held = shared[counts + i] if by_count else shared[masses + i]
            if in_front + held >= need or i == size - 1:
                return i
            shared[found_mass] += shared[masses + i]
            shared[found_count] += shared[counts + i]
        return size - 1

    @ptx.kernel(threads, 1)
    def sample(logits, seen, options, generator, best, token):
        shared = cuda.shared.array(0, int64)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        thread = cuda.threadIdx.x
        temperature, top_k = options[TEMPERATURE], int64(options[TOP_K])
        top_p, min_p, penalty = options[TOP_P], options[MIN_P], np.float32(options[PENALTY])
        best_key = best[0]
        best_token = token_id(best_key)
        some_k = top_k > 0 and top_k < vocabulary
        # Infinity and NaN leave no probabilities to draw from.
        if temperature == 0.0 or top_k == 1 or best_key >= _INFINITE:
            if thread == 0:
                token[0] = best_token
            return
        by_id = not some_k and top_p >= 1.0 and min_p <= 0.0
        most_likely = penalised(logits, seen, best_token, penalty)

        entry = thread
        while entry < scalars + 8:
            shared[entry] = 0
            entry += threads
        cuda.syncthreads()
        kept_by_min_p = int64(0)
        candidate = int64(thread)
        while candidate < vocabulary:
            place_in_order, _, mass = measure(logits, seen, candidate, penalty, most_likely, temperature, by_id)
            if mass > 0:
                cuda.atomic.add(shared, place_in_order, mass)
                cuda.atomic.add(shared, counts_start + place_in_order, 1)
                if float(mass) >= min_p * _UNIT:
                    kept_by_min_p += mass
            candidate += threads
        if kept_by_min_p > 0:
            cuda.atomic.add(shared, min_p_mass, kept_by_min_p)
        cuda.syncthreads()
        entry = thread
        while entry < bins // _STRIDE:
            mass, count = int64(0), int64(0)
            for i in range(_STRIDE):
                mass += shared[entry * _STRIDE + i]
                count += shared[counts_start + entry * _STRIDE + i]
            shared[strides_start + entry] = mass
            shared[strides_start + bins // _STRIDE + entry] = count
            entry += threads
        cuda.syncthreads()

        total, total_count = int64(0), int64(0)
        for i in range(bins // _STRIDE):
            total += shared[strides_start + i]
            total_count += shared[strides_start + bins // _STRIDE + i]
        kept = total  # mass that top-k leaves, then that everything leaves
        for stage in range(3):
            by_count = stage == 0
            need = int64(0)  # 0: this filter is off
            if stage == 0 and some_k and top_k < total_count:
                need = top_k
            if stage == 1 and top_p < 1.0:
                need = min(max(int64(math.ceil(top_p * float(kept))), int64(1)), kept)
            if stage == 2:
                if min_p > 0.0:
                    kept = min(kept, shared[min_p_mass])
                uniform = float(ptx.random_53_bits(generator[0], generator[1])) * 2.0**-53
                need = min(int64(uniform * float(kept)) + 1, kept)
            if need > 0:
                # Which bin: first over sums of 32 bins, then within those.
                cuda.syncthreads()
                if thread == 0:
                    shared[found_mass], shared[found_count] = 0, 0
                    first = choose_place(
                        shared, strides_start, strides_start + bins // _STRIDE, bins // _STRIDE, need, by_count
                    )
                    first *= _STRIDE
                    within = choose_place(shared, first, counts_start + first, _STRIDE, need, by_count)
                    shared[place] = first + within
                    shared[listed] = shared[counts_start + first + within]
                cuda.syncthreads()
                selected = shared[place]
                shift, prefix = int64(_KEY_BITS), int64(0)
                while shared[listed] > capacity:
                    # Too many tokens in one bin: narrow them down by digits of the key, the largest first.
                    shift -= _DIGIT_BITS
                    cuda.syncthreads()
                    entry = thread
                    while entry < 2 * _DIGITS:
                        shared[digits_start + entry] = 0
                        entry += threads
                    cuda.syncthreads()
                    candidate = int64(thread)
                    while candidate < vocabulary:
                        bin_, key, mass = measure(logits, seen, candidate, penalty, most_likely, temperature, by_id)
                        if mass > 0 and bin_ == selected and key >> (shift + _DIGIT_BITS) == prefix:
                            digit = _DIGITS - 1 - ((key >> shift) & (_DIGITS - 1))
                            cuda.atomic.add(shared, digits_start + digit, mass)
                            cuda.atomic.add(shared, digit_counts_start + digit, 1)
                        candidate += threads
                    cuda.syncthreads()
                    if thread == 0:
                        within = choose_place(shared, digits_start, digit_counts_start, _DIGITS, need, by_count)
                        shared[place] = _DIGITS - 1 - within
                        shared[listed] = shared[digit_counts_start + within]
                    cuda.syncthreads()
                    prefix = prefix << _DIGIT_BITS | shared[place]

                # List the tokens that are left, and rank them among themselves.
                size = shared[listed]
                cuda.syncthreads()
                if thread == 0:
                    shared[listed] = 0
                cuda.syncthreads()
                candidate = int64(thread)
                while candidate < vocabulary:
                    bin_, key, mass = measure(logits, seen, candidate, penalty, most_likely, temperature, by_id)
                    if mass > 0 and bin_ == selected and key >> shift == prefix:
                        at = cuda.atomic.add(shared, listed, 1)
                        shared[keys_start + at] = key
                        shared[masses_start + at] = mass
                    candidate += threads
                cuda.syncthreads()
                entry = thread
                while entry < size:
                    key, mass = shared[keys_start + entry], shared[masses_start + entry]
                    in_front_mass, in_front_count = shared[found_mass], shared[found_count]
                    for i in range(size):
                        if shared[keys_start + i] > key:
                            in_front_mass += shared[masses_start + i]
                            in_front_count += 1
                    in_front = in_front_count if by_count else in_front_mass
                    held = int64(1) if by_count else mass
                    if in_front < need and in_front + held >= need:
                        shared[chosen] = token_id(key)
                        shared[reached] = in_front_mass + mass
                    entry += threads
                cuda.syncthreads()
                if stage < 2:
                    # Later filters see what earlier ones kept; min-p's mass is taken from the whole order.
                    kept = min(kept, shared[reached])
        if thread == 0:
            token[0] = shared[chosen]
            generator[1] += 1

    return sample


def sample_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_sample`."""
    signature, shared_bytes = (F32, U32, F64, U64, I64, I32), sample_shared_bytes(BINS, CAPACITY)
    options = {"vocabulary": vocabulary, "dependent": dependent}
    return Planned(kernel_spec("sample", make_sample, signature, SAMPLE_THREADS, shared_bytes, **options), 1)


@ptx.device_function
def hand_over(token, best, seen, ring_entries, size, count):
    """A token is chosen: it is marked as seen, and the host is told.

    Args of it: token; best, its arg-max's key; seen uint32 bitmap, ring_entries uint64 [size] in pinned host memory,
    count int64 [1]. An entry of the ring is one store of 8 bytes: the number of the token, from 1 on, above its id,
    with bit 31 set if its logit is infinite or no number; so whoever reads the number has the rest as well.
    """
    number = count[0] + 1
    count[0] = number
    seen[token // 32] = np.uint32(int64(seen[token // 32]) | int64(1) << (token % 32))
    broken = int64(1) if best >= _INFINITE else int64(0)
    word = (number & 0xFFFFFFFF) << 32 | broken << 31 | token
    ring_entries[(number - 1) % size] = np.uint64(word)
    cuda.threadfence_system()


def make_advance(ring: int, *, sampled: bool, dependent: bool = False) -> Any:
    """The step's last kernel: the position moves. If a token was chosen, it is handed over, and `best` is made ready
    for the next arg-max.

    Kernel (token int32 [1] from `sample`, best int64 [1] from the arg-max, position int64 [1], seen, ring of `ring`
    entries and count as in `hand_over`, tokens int64: how far the position moves).
    Launch: one block of one thread.
    """

    @ptx.kernel(32, 1)
    def advance(token, best, position, seen, ring_entries, count, tokens):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        position[0] += tokens
        if sampled:
            hand_over(int64(token[0]), best[0], seen, ring_entries, ring, count)
            best[0] = LOWEST_KEY

    return advance


def advance_kernel(ring: int, *, sampled: bool, dependent: bool) -> Planned:
    """The spec of the kernel of `make_advance`."""
    name, signature = "advance_sampled" if sampled else "advance", (I32, I64, I64, U32, U64, I64, NUMBER)
    options = {"ring": ring, "sampled": sampled, "dependent": dependent}
    return Planned(kernel_spec(name, make_advance, signature, 1, **options), 1)
