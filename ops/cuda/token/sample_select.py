"""The selection of a token in the sampling kernel (`sample.py`), by one CTA.

The k-th token, the token with which the mass reaches p, and the one that is drawn are each an offset in the order of
the tokens. The histogram gives the bin of an offset; `sample_search.py` finds the bin's tokens. While they are more
than can be ranked, a radix select on digits of the key narrows them down; digits begin where the keys of these tokens
differ. Each token that is left adds up those before it.

A sort of the listed tokens instead would take 45 rounds for 512 of them, each with a barrier. The digits' sums are in
L2 as the histogram's are: adding them takes two instructions for each token, and fetching them some 1.5 us.
"""

from typing import Any

from numba import cuda, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import u32
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, KEY_BITS, token_id
from numba_atomflow.ops.cuda.token.sample_histogram import make_first_reaching, make_take_running_sums, sum_before
from numba_atomflow.ops.cuda.token.sample_layout import DIGIT_BITS, DIGITS, SampleLayout
from numba_atomflow.ops.cuda.token.sample_measures import key_of, mass_of
from numba_atomflow.ops.cuda.token.sample_search import Visit, make_find_tokens, make_for_each


def make_find_keys(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, b, v, thread): the least and the largest key that the tokens of a bin may have."""
    least_rank, largest_rank = 2 * layout.rank_range, 2 * layout.rank_range + 1
    least_id_part = ID_MASK - (vocabulary - 1)

    @ptx.device_function
    def note_rank(d, v, token, logit):
        rank = key_of(d, token, logit) >> ID_BITS
        v.extremes[0], v.extremes[1] = min(v.extremes[0], rank), max(v.extremes[1], rank)

    for_each = make_for_each(vocabulary, layout, threads, note_rank)

    @ptx.device_function
    def find_keys(d, b, v, thread):
        halves = cuda.shared.array(0, uint32)  # the same memory: an atomic of 32 bits is one instruction
        if thread == 0:
            halves[least_rank], halves[largest_rank] = u32(0xFFFFFFFF), u32(0)
        cuda.syncthreads()
        v.extremes[0], v.extremes[1] = int64(0xFFFFFFFF), int64(0)
        for_each(d, b, v, thread)
        if v.extremes[0] <= v.extremes[1]:
            cuda.atomic.min(halves, least_rank, u32(v.extremes[0]))
            cuda.atomic.max(halves, largest_rank, u32(v.extremes[1]))
        cuda.syncthreads()
        least, largest = int64(halves[least_rank]), int64(halves[largest_rank])
        return least << ID_BITS | least_id_part, largest << ID_BITS | ID_MASK

    return find_keys


def make_narrow_down(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, b, v, offset, size, by_count, thread): radix select among the tokens of a bin.

    Args:
        offset: of the sought token among them, a number of tokens if `by_count`, else a mass.
        size: how many they are.

    Returns the least and the largest key of those that are left, and mass and number of the bin's tokens before them.
    """
    find_keys = make_find_keys(vocabulary, layout, threads)
    take_digits = make_take_running_sums(layout.digits, layout.digit_counts, DIGITS, threads)
    first_reaching = make_first_reaching(DIGITS)
    capacity, digits, digit_counts = layout.capacity, layout.digits, layout.digit_counts

    @ptx.device_function
    def add_digit(d, v, token, logit):
        """Mass and number per digit, the digit of the largest keys first."""
        key = key_of(d, token, logit)
        if key >= v.least_key and key <= v.largest_key:
            mass = mass_of(d, logit)
            if mass > 0:
                digit = (v.largest_key - key) >> v.shift
                cuda.atomic.add(v.sums, digits + digit, mass)
                cuda.atomic.add(v.sums, digit_counts + digit, 1)

    for_each = make_for_each(vocabulary, layout, threads, add_digit)

    @ptx.device_function
    def narrow_down(d, b, v, offset, size, by_count, thread):
        least_key, largest_key = int64(0), int64((1 << KEY_BITS) - 1)
        mass_before, count_before = int64(0), int64(0)
        if size > capacity:
            least_key, largest_key = find_keys(d, b, v, thread)
        while size > capacity:
            shift = int64(0)
            while (largest_key - least_key) >> (shift + DIGIT_BITS) != 0:
                shift += 1
            for_each(d, b, Visit(v.sums, v.shared, least_key, largest_key, shift, v.extremes), thread)
            ptx.fence_gpu()
            cuda.syncthreads()
            take_digits(v.sums, v.shared, thread)
            remaining = offset - (count_before if by_count else mass_before)
            digit = first_reaching(v.shared, digit_counts if by_count else digits, remaining)
            digits_before = sum_before(v.shared, digit_counts, digit)
            size = v.shared[digit_counts + digit] - digits_before
            count_before += digits_before
            mass_before += sum_before(v.shared, digits, digit)
            largest_key -= digit << shift
            least_key = max(least_key, largest_key - (int64(1) << shift) + 1)
            cuda.syncthreads()
        return least_key, largest_key, mass_before, count_before

    return narrow_down


def make_rank(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, b, v, before, target, by_count, thread): the token at an offset, of those of a bin that have
    the keys of v, into `layout.chosen_token`; the mass up to it into `layout.mass_reached`.

    Args:
        before: mass and number of the tokens before them; `target` includes them.
    """
    capacity, size_entry = layout.capacity, layout.ranked_size
    keys, masses, chosen_token, mass_reached = layout.keys, layout.masses, layout.chosen_token, layout.mass_reached

    @ptx.device_function
    def copy_key(d, v, token, logit):
        """Key and mass to shared memory."""
        key = key_of(d, token, logit)
        if key >= v.least_key and key <= v.largest_key:
            mass = mass_of(d, logit)
            if mass > 0:
                index = int64(cuda.atomic.add(cuda.shared.array(0, uint32), 2 * size_entry, u32(1)))
                if index < capacity:
                    v.shared[keys + index], v.shared[masses + index] = key, mass

    for_each = make_for_each(vocabulary, layout, threads, copy_key)

    @ptx.device_function
    def rank(d, b, v, before, target, by_count, thread):
        shared = v.shared
        if thread == 0:
            shared[size_entry] = 0
        cuda.syncthreads()
        for_each(d, b, v, thread)
        cuda.syncthreads()
        size = min(shared[size_entry], int64(capacity))
        entry = thread
        while entry < size:
            key, mass = shared[keys + entry], shared[masses + entry]
            mass_up_to, count_up_to = before
            for i in range(size):
                if shared[keys + i] > key:
                    mass_up_to += shared[masses + i]
                    count_up_to += 1
            sum_up_to = count_up_to if by_count else mass_up_to
            increment = int64(1) if by_count else mass
            if sum_up_to < target and sum_up_to + increment >= target:
                shared[chosen_token] = token_id(key)
                shared[mass_reached] = mass_up_to + mass
            entry += threads
        cuda.syncthreads()

    return rank


def make_select(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, sums, shared, target, by_count, thread): find the token with which the running sum of the
    order reaches `target`, a number of tokens if `by_count`, else a mass: into `layout.chosen_token`; and the mass up
    to it, `layout.mass_reached`.
    """
    find_tokens = make_find_tokens(vocabulary, layout, threads)
    narrow_down, rank = make_narrow_down(vocabulary, layout, threads), make_rank(vocabulary, layout, threads)
    first_reaching, counts = make_first_reaching(layout.bins), layout.counts

    @ptx.device_function
    def select(d, sums, shared, target, by_count, thread):
        extremes = cuda.local.array(2, int64)
        v = Visit(sums, shared, int64(0), int64(0), int64(0), extremes)
        bin_ = first_reaching(shared, counts if by_count else 0, target)
        mass, count = sum_before(shared, 0, bin_), sum_before(shared, counts, bin_)
        size, offset = shared[counts + bin_] - count, target - (count if by_count else mass)
        b = find_tokens(d, v, bin_, thread)
        least, largest, mass_before, count_before = narrow_down(d, b, v, offset, size, by_count, thread)
        v = Visit(sums, shared, least, largest, int64(0), extremes)
        rank(d, b, v, (mass + mass_before, count + count_before), target, by_count, thread)

    return select
