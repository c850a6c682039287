"""Sampling on the device: temperature, top-k, top-p, min-p and the random draw, in one kernel of one CTA.

`numba_atomflow/sampling.py` says what the options mean. They are read from device memory, and so is the state of the
random generator: one captured graph serves every request.

What the filters keep is always a prefix of the tokens in descending order of their keys (`order.py`), so all that is
needed of a filter is the probability mass that it keeps; the mass kept by all of them is the least. Mass is counted in
units of 2^-44 of the most likely token's: integers, whose sums do not depend on the order in which atomics add them.
Tokens below one unit are never drawn.

1. One pass over the logits makes a histogram of mass and number over 2,048 bins of the logit.
2. Top-k, top-p and the draw each look for an offset in the order: the k-th token; where the mass reaches p; where the
   random number falls. The histogram gives the bin, whose tokens are then listed and ranked among themselves.
3. If more tokens than fit into shared memory share a bin (equal logits), a radix select on digits of the key narrows
   them down first.

Without filters the order is that of the ids, and only the draw looks for an offset.

Cost model: one CTA makes 2 passes over the logits without filters, up to 4 with, predicted 5-8 us each for 128,256
tokens: 12-30 us, 1-3 % of a 3B model's step.
"""

import math
from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.cuda.token.order import (
    ID_BITS,
    ID_MASK,
    KEY_BITS,
    MIN_P,
    NON_FINITE_KEY,
    PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    penalised,
    rank,
    token_id,
)

THREADS = 1024
BINS, CAPACITY = 2048, 512  # of the histogram; of the list of tokens that are ranked among themselves

_UNIT = float(2**44)
_DIGIT_BITS, _DIGITS = 8, 256
_STRIDE = 32  # bins that one thread adds up
_BINS_PER_TEMPERATURE = f32(64.0)  # 2,048 bins reach down to e^-32, below one unit
_TOP_K_STAGE, _TOP_P_STAGE, _DRAW_STAGE = range(3)


class SampleArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        logits: [V].
        seen: bitmap [ceil(V / 32)] of the tokens in the context.
        options: [5], see `order`.
        generator: [2]: seed and number of draws.
        best: [1], the arg-max's key.
        token: [1], the result.
    """

    logits: F32
    seen: U32
    options: F64
    generator: U64
    best: I64
    token: I32


class _Distribution(NamedTuple):
    """What a token's mass and key are computed from. `by_id`: the order is that of the ids."""

    logits: Any
    seen: Any
    penalty: Any
    most_likely: Any
    temperature: Any
    by_id: Any


def sample_shared_bytes(bins: int, capacity: int) -> int:
    """Dynamic shared memory of the sampling kernel: two histograms, digits, a list of tokens, scalars."""
    return 8 * (2 * bins + 2 * _DIGITS + 2 * bins // _STRIDE + 2 * capacity + 8)


def make_sample(
    vocabulary: int,
    *,
    threads: int = THREADS,
    bins: int = BINS,
    capacity: int = CAPACITY,
    by_row: bool = False,
    dependent: bool = False,
) -> Any:
    """Kernel (`SampleArguments`): token[0] = the next token; a draw is counted.

    Launch: one CTA of `threads` threads with `sample_shared_bytes(bins, capacity)` of dynamic shared memory; one for
    each row, if it is `by_row`.

    Args:
        bins: of the histogram, a multiple of 32.
        capacity: tokens that are ranked in shared memory.
        by_row: there are several rows of logits, each with arguments of its own, but for `options`.
    """
    # Shared memory, int64: masses and numbers of the histogram, of the digits, and of strides of 32 bins; keys and
    # masses of the listed tokens; scalars.
    strides = bins // _STRIDE
    counts_start, digits_start = bins, 2 * bins
    digit_counts_start = digits_start + _DIGITS
    strides_start = digit_counts_start + _DIGITS
    stride_counts_start = strides_start + strides
    keys_start = strides_start + 2 * strides
    masses_start = keys_start + capacity
    scalars = masses_start + capacity
    mass_before, count_before, found_entry, list_size = (scalars + i for i in range(4))
    min_p_mass, chosen_token, mass_reached = (scalars + i for i in range(4, 7))

    id_shift = max(0, (vocabulary - 1).bit_length() - bins.bit_length() + 1)  # ids fall into bins in their own order
    last_bin = bins - 1

    words = -(-vocabulary // 32)

    @ptx.device_function
    def of_row(io, row):
        """The arguments of one row."""
        return SampleArguments(
            io.logits[row * vocabulary : (row + 1) * vocabulary],
            io.seen[row * words : (row + 1) * words],
            io.options,
            io.generator[2 * row : 2 * row + 2],
            io.best[row : row + 1],
            io.token[row : row + 1],
        )

    @ptx.device_function
    def measure(d, token):
        """Bin, key and mass of a token."""
        logit = penalised(d.logits, d.seen, token, d.penalty)
        order = int64(0) if d.by_id else rank(logit) << ID_BITS
        key = order | (ID_MASK - token)
        distance = (d.most_likely - logit) * (_BINS_PER_TEMPERATURE / f32(d.temperature))
        in_range = distance < f32(last_bin)  # NaN and -infinity go to the last bin, without mass
        nearness = int64(distance) if in_range else int64(last_bin)
        bin_ = token >> id_shift if d.by_id else nearness
        exponent = float(logit) / d.temperature - float(d.most_likely) / d.temperature
        mass = int64(math.exp(exponent) * _UNIT) if exponent > -40.0 else int64(0)
        return bin_, key, mass

    @ptx.device_function
    def clear(shared, start, end, thread):
        entry = thread
        while entry < end:
            shared[start + entry] = 0
            entry += threads

    @ptx.device_function
    def make_histogram(d, min_p, shared, thread):
        """Mass and number of tokens per bin; the mass that min-p keeps."""
        kept_by_min_p = int64(0)
        candidate = int64(thread)
        while candidate < vocabulary:
            bin_, _, mass = measure(d, candidate)
            if mass > 0:
                cuda.atomic.add(shared, bin_, mass)
                cuda.atomic.add(shared, counts_start + bin_, 1)
                if float(mass) >= min_p * _UNIT:
                    kept_by_min_p += mass
            candidate += threads
        if kept_by_min_p > 0:
            cuda.atomic.add(shared, min_p_mass, kept_by_min_p)

    @ptx.device_function
    def add_up_strides(shared, thread):
        """Mass and number of tokens per 32 bins."""
        entry = thread
        while entry < strides:
            mass, count = int64(0), int64(0)
            for i in range(_STRIDE):
                mass += shared[entry * _STRIDE + i]
                count += shared[counts_start + entry * _STRIDE + i]
            shared[strides_start + entry] = mass
            shared[stride_counts_start + entry] = count
            entry += threads

    @ptx.device_function
    def first_reaching(shared, masses, counts, size, target, by_count):
        """The first of `size` entries with which the running sum reaches `target`; thread 0 only.

        mass_before and count_before grow by the entries before it.
        """
        for i in range(size):
            sum_before = shared[count_before] if by_count else shared[mass_before]
            increment = shared[counts + i] if by_count else shared[masses + i]
            if sum_before + increment >= target or i == size - 1:
                return i
            shared[mass_before] += shared[masses + i]
            shared[count_before] += shared[counts + i]
        return size - 1

    @ptx.device_function
    def find_bin(shared, target, by_count, thread):
        """The bin in which the running sum reaches `target`: over strides of 32 bins first, then within one."""
        cuda.syncthreads()
        if thread == 0:
            shared[mass_before], shared[count_before] = 0, 0
            first_bin = first_reaching(shared, strides_start, stride_counts_start, strides, target, by_count)
            first_bin *= _STRIDE
            bin_in_stride = first_reaching(shared, first_bin, counts_start + first_bin, _STRIDE, target, by_count)
            shared[found_entry] = first_bin + bin_in_stride
            shared[list_size] = shared[counts_start + first_bin + bin_in_stride]
        cuda.syncthreads()
        return shared[found_entry]

    @ptx.device_function
    def narrow_down(d, shared, selected_bin, target, by_count, thread):
        """Radix select: while too many tokens share the bin, narrow them down by a digit, the largest first.

        Returns shift and prefix: the tokens that are left are those with `key >> shift == prefix`.
        """
        shift, prefix = int64(KEY_BITS), int64(0)
        while shared[list_size] > capacity:
            shift -= _DIGIT_BITS
            cuda.syncthreads()
            clear(shared, digits_start, 2 * _DIGITS, thread)
            cuda.syncthreads()
            candidate = int64(thread)
            while candidate < vocabulary:
                bin_, key, mass = measure(d, candidate)
                if mass > 0 and bin_ == selected_bin and key >> (shift + _DIGIT_BITS) == prefix:
                    digit = _DIGITS - 1 - ((key >> shift) & (_DIGITS - 1))
                    cuda.atomic.add(shared, digits_start + digit, mass)
                    cuda.atomic.add(shared, digit_counts_start + digit, 1)
                candidate += threads
            cuda.syncthreads()
            if thread == 0:
                digit_index = first_reaching(shared, digits_start, digit_counts_start, _DIGITS, target, by_count)
                shared[found_entry] = _DIGITS - 1 - digit_index
                shared[list_size] = shared[digit_counts_start + digit_index]
            cuda.syncthreads()
            prefix = prefix << _DIGIT_BITS | shared[found_entry]
        return shift, prefix

    @ptx.device_function
    def list_tokens(d, shared, selected_bin, shift, prefix, thread):
        """Keys and masses of the tokens that are left; returns how many."""
        size = shared[list_size]
        cuda.syncthreads()
        if thread == 0:
            shared[list_size] = 0
        cuda.syncthreads()
        candidate = int64(thread)
        while candidate < vocabulary:
            bin_, key, mass = measure(d, candidate)
            if mass > 0 and bin_ == selected_bin and key >> shift == prefix:
                index = cuda.atomic.add(shared, list_size, 1)
                shared[keys_start + index] = key
                shared[masses_start + index] = mass
            candidate += threads
        cuda.syncthreads()
        return size

    @ptx.device_function
    def choose(shared, size, target, by_count, thread):
        """The listed token with which the running sum reaches `target`, and the mass up to it."""
        entry = thread
        while entry < size:
            key, mass = shared[keys_start + entry], shared[masses_start + entry]
            mass_up_to, count_up_to = shared[mass_before], shared[count_before]
            for i in range(size):
                if shared[keys_start + i] > key:
                    mass_up_to += shared[masses_start + i]
                    count_up_to += 1
            sum_before = count_up_to if by_count else mass_up_to
            increment = int64(1) if by_count else mass
            if sum_before < target and sum_before + increment >= target:
                shared[chosen_token] = token_id(key)
                shared[mass_reached] = mass_up_to + mass
            entry += threads
        cuda.syncthreads()

    @ptx.kernel(threads, 1)
    def sample(io):
        shared = cuda.shared.array(0, int64)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        if by_row:
            io = of_row(io, int64(cuda.blockIdx.x))
        thread = cuda.threadIdx.x
        temperature, top_k = io.options[TEMPERATURE], int64(io.options[TOP_K])
        top_p, min_p, penalty = io.options[TOP_P], io.options[MIN_P], f32(io.options[PENALTY])
        best_key = io.best[0]
        best_token = token_id(best_key)
        some_k = top_k > 0 and top_k < vocabulary
        # +Inf and NaN leave no probabilities to draw from.
        if temperature == 0.0 or top_k == 1 or best_key >= NON_FINITE_KEY:
            if thread == 0:
                io.token[0] = best_token
            return
        by_id = not some_k and top_p >= 1.0 and min_p <= 0.0
        most_likely = penalised(io.logits, io.seen, best_token, penalty)
        d = _Distribution(io.logits, io.seen, penalty, most_likely, temperature, by_id)

        clear(shared, 0, scalars + 8, thread)
        cuda.syncthreads()
        make_histogram(d, min_p, shared, thread)
        cuda.syncthreads()
        add_up_strides(shared, thread)
        cuda.syncthreads()
        total, total_count = int64(0), int64(0)
        for i in range(strides):
            total += shared[strides_start + i]
            total_count += shared[stride_counts_start + i]

        kept_mass = total  # mass that top-k leaves, then that all filters leave
        for stage in range(3):
            by_count = stage == _TOP_K_STAGE
            target = int64(0)  # 0: this filter is off
            if stage == _TOP_K_STAGE and some_k and top_k < total_count:
                target = top_k
            if stage == _TOP_P_STAGE and top_p < 1.0:
                target = min(max(int64(math.ceil(top_p * float(kept_mass))), int64(1)), kept_mass)
            if stage == _DRAW_STAGE:
                if min_p > 0.0:
                    kept_mass = min(kept_mass, shared[min_p_mass])
                uniform = float(ptx.random_53_bits(io.generator[0], io.generator[1])) * 2.0**-53
                target = min(int64(uniform * float(kept_mass)) + 1, kept_mass)
            if target > 0:
                selected_bin = find_bin(shared, target, by_count, thread)
                shift, prefix = narrow_down(d, shared, selected_bin, target, by_count, thread)
                size = list_tokens(d, shared, selected_bin, shift, prefix, thread)
                choose(shared, size, target, by_count, thread)
                if stage < _DRAW_STAGE:
                    # Later filters see what earlier ones kept; min-p's mass is taken from the whole order.
                    kept_mass = min(kept_mass, shared[mass_reached])
        if thread == 0:
            io.token[0] = shared[chosen_token]
            io.generator[1] += 1

    return sample


def sample_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_sample`."""
    shared_bytes, options = sample_shared_bytes(BINS, CAPACITY), {"vocabulary": vocabulary, "dependent": dependent}
    return Planned(kernel_spec("sample", make_sample, SampleArguments, THREADS, shared_bytes, **options), 1)


def sample_rows_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The same for several rows, with a CTA for each."""
    shared_bytes = sample_shared_bytes(BINS, CAPACITY)
    options = {"vocabulary": vocabulary, "dependent": dependent, "by_row": True}
    return Planned(kernel_spec("sample_rows", make_sample, SampleArguments, THREADS, shared_bytes, **options), 1)
