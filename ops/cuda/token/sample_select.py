"""The selection of a token in the sampling kernel (`sample.py`), by one CTA.

The k-th token, the token with which the mass reaches p, and the one that is drawn are each an offset in the order of
the tokens. The histogram gives the bin of an offset. The bin's tokens are then ranked among themselves:

1. Their ids are listed in shared memory, in one pass over the vocabulary: it compares distances in float32, and no more
   than that is computed of the tokens that are elsewhere. If the tokens of all earlier bins fit into the list as well,
   they are listed too: later offsets are never farther down, and need no list of their own.
2. While more tokens are left than are ranked, a radix select on digits of the key narrows them down. Digits begin where
   the keys of these tokens differ.
3. Each token that is left adds up those before it.

Tokens that are too many for the list (equal logits, high temperatures) are narrowed down in passes over the vocabulary.
Without filters a bin is a range of ids, and needs no list.
"""

import math
from typing import Any, NamedTuple

from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32, u32
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, KEY_BITS, penalised, token_id
from numba_atomflow.ops.cuda.token.sample_histogram import make_first_reaching, make_take_running_sums, sum_before
from numba_atomflow.ops.cuda.token.sample_layout import DIGIT_BITS, DIGITS, SampleLayout
from numba_atomflow.ops.cuda.token.sample_measures import distance_of, id_shift, key_of, make_load_logits, mass_of

_IN_FLIGHT = 16  # logits that a thread loads at a time


class Candidates(NamedTuple):
    """Where to look for the tokens of a bin.

    Attributes:
        start, end: entries of the list if it is `listed`, else ids.
        nearest, farther: distances of the bin's tokens, float32: from `nearest` on, below `farther`.
    """

    start: Any
    end: Any
    listed: Any
    nearest: Any
    farther: Any


@ptx.device_function
def in_range(distance, nearest, farther):
    """Whether a token is in the bins of these distances; not if its logit is -Inf."""
    return distance >= nearest and distance < farther


def make_list_bins(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, shared, first_bin, last_bin, thread): list the ids of these bins, in any order.

    If they are too many - beside tokens that have been counted there may be some whose mass is 0 - none is listed.
    """
    in_flight = max(1, min(_IN_FLIGHT, vocabulary // threads))
    batch, last_begin = in_flight * threads, max(0, vocabulary - in_flight * threads)
    load_logits = make_load_logits(vocabulary, in_flight, clamped=False)
    distances = make_distances(layout.bins)
    ids_start, size_entry, capacity = 2 * layout.ids, layout.list_size, layout.list_capacity
    first_listed, last_listed = layout.first_listed_bin, layout.last_listed_bin

    @ptx.device_function
    def list_bins(d, shared, first_bin, last_bin, thread):
        halves = cuda.shared.array(0, uint32)  # the same memory
        logits = cuda.local.array(in_flight, float32)
        nearest, _ = distances(first_bin)
        _, farther = distances(last_bin)
        if thread == 0:
            shared[size_entry] = 0
        cuda.syncthreads()
        begin = int64(0)
        while begin < vocabulary:
            # The last batch begins early enough to be whole; what the one before it had is left out.
            token = min(begin, int64(last_begin)) + min(thread, vocabulary - 1)
            load_logits(d, token, threads, logits)
            found = u32(0)
            for i in range(in_flight):
                if in_range(distance_of(d, logits[i]), nearest, farther):
                    found = u32(found | (1 << i))
            while found != 0:
                other = token + (cuda.ffs(found) - 1) * threads
                found = u32(found & (found - 1))
                if other >= begin and thread < vocabulary:
                    index = int64(cuda.atomic.add(halves, 2 * size_entry, u32(1)))
                    if index < capacity:
                        halves[ids_start + index] = u32(other)
            begin += batch
        cuda.syncthreads()
        if thread == 0:
            fits = shared[size_entry] <= capacity
            shared[first_listed], shared[last_listed] = first_bin if fits else 0, last_bin if fits else -1
        cuda.syncthreads()

    return list_bins


def make_distances(bins: int) -> Any:
    """Device function (bin): distances of its tokens, `nearest` and `farther`."""

    @ptx.device_function
    def distances(bin_):
        nearest = f32(bin_) if bin_ > 0 else f32(-math.inf)
        return nearest, (f32(bin_ + 1) if bin_ < bins - 1 else f32(math.inf))

    return distances


def make_find_candidates(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, shared, bin, thread) -> `Candidates`; their ids have been listed if that is of use."""
    list_bins, distances = make_list_bins(vocabulary, layout, threads), make_distances(layout.bins)
    shift, capacity, counts = id_shift(vocabulary, layout.bins), layout.list_capacity, layout.counts
    first_listed, last_listed, list_size = layout.first_listed_bin, layout.last_listed_bin, layout.list_size

    @ptx.device_function
    def find_candidates(d, shared, bin_, thread):
        nearest, farther = distances(bin_)
        if d.by_id:
            end = min((bin_ + 1) << shift, int64(vocabulary))
            return Candidates(bin_ << shift, end, False, f32(-math.inf), f32(math.inf))
        first_bin = int64(0) if shared[counts + bin_] <= capacity else bin_
        listed = shared[first_listed] <= bin_ and bin_ <= shared[last_listed]
        fits = shared[counts + bin_] - sum_before(shared, counts, first_bin) <= capacity
        cuda.syncthreads()
        if not listed and fits:
            list_bins(d, shared, first_bin, bin_, thread)
            listed = shared[first_listed] <= bin_ and bin_ <= shared[last_listed]
        return Candidates(int64(0), shared[list_size] if listed else int64(vocabulary), listed, nearest, farther)

    return find_candidates


def make_token_at(layout: SampleLayout) -> Any:
    """Device function (c, entry): the token of an entry of candidates."""
    ids_start = 2 * layout.ids

    @ptx.device_function
    def token_at(c, entry):
        halves = cuda.shared.array(0, uint32)
        return int64(halves[ids_start + entry]) if c.listed else entry

    return token_at


def make_narrow_down(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, c, sums, shared, offset, size, by_count, thread): radix select among the candidates.

    Args:
        offset: of the sought token among them, a number of tokens if `by_count`, else a mass.
        size: how many they are.

    Returns the least and the largest key of those that are left, and number and mass of the candidates before them.
    """
    token_at = make_token_at(layout)
    take_digits = make_take_running_sums(layout.digits, layout.digit_counts, DIGITS, threads)
    first_reaching = make_first_reaching(DIGITS)
    capacity, digits, digit_counts, rank_range = layout.capacity, layout.digits, layout.digit_counts, layout.rank_range
    least_id_part = ID_MASK - (vocabulary - 1)

    @ptx.device_function
    def find_keys(d, c, thread):
        """The least and the largest key that the candidates may have."""
        halves = cuda.shared.array(0, uint32)
        if thread == 0:
            halves[2 * rank_range], halves[2 * rank_range + 1] = u32(0xFFFFFFFF), u32(0)
        cuda.syncthreads()
        least, largest = int64(0xFFFFFFFF), int64(0)
        entry = c.start + thread
        while entry < c.end:
            token = token_at(c, entry)
            logit = penalised(d.logits, d.seen, token, d.penalty)
            if in_range(distance_of(d, logit), c.nearest, c.farther):
                rank = key_of(d, token, logit) >> ID_BITS
                least, largest = min(least, rank), max(largest, rank)
            entry += threads
        if least <= largest:
            cuda.atomic.min(halves, 2 * rank_range, u32(least))
            cuda.atomic.max(halves, 2 * rank_range + 1, u32(largest))
        cuda.syncthreads()
        least, largest = int64(halves[2 * rank_range]), int64(halves[2 * rank_range + 1])
        return least << ID_BITS | least_id_part, largest << ID_BITS | ID_MASK

    @ptx.device_function
    def add_digits(d, c, sums, least_key, largest_key, shift, thread):
        """Mass and number per digit, the digit of the largest keys first."""
        entry = c.start + thread
        while entry < c.end:
            token = token_at(c, entry)
            logit = penalised(d.logits, d.seen, token, d.penalty)
            if in_range(distance_of(d, logit), c.nearest, c.farther):
                key, mass = key_of(d, token, logit), mass_of(d, logit)
                if mass > 0 and key >= least_key and key <= largest_key:
                    digit = (largest_key - key) >> shift
                    cuda.atomic.add(sums, digits + digit, mass)
                    cuda.atomic.add(sums, digit_counts + digit, 1)
            entry += threads

    @ptx.device_function
    def narrow_down(d, c, sums, shared, offset, size, by_count, thread):
        least_key, largest_key = int64(0), int64((1 << KEY_BITS) - 1)
        mass_before, count_before = int64(0), int64(0)
        if size > capacity:
            least_key, largest_key = find_keys(d, c, thread)
        while size > capacity:
            shift = int64(0)
            while (largest_key - least_key) >> (shift + DIGIT_BITS) != 0:
                shift += 1
            add_digits(d, c, sums, least_key, largest_key, shift, thread)
            ptx.fence_gpu()
            cuda.syncthreads()
            take_digits(sums, shared, thread)
            remaining = offset - (count_before if by_count else mass_before)
            digit = first_reaching(shared, digit_counts if by_count else digits, remaining)
            digits_before = sum_before(shared, digit_counts, digit)
            size = shared[digit_counts + digit] - digits_before
            count_before += digits_before
            mass_before += sum_before(shared, digits, digit)
            largest_key -= digit << shift
            least_key = max(least_key, largest_key - (int64(1) << shift) + 1)
            cuda.syncthreads()
        return least_key, largest_key, mass_before, count_before

    return narrow_down


def make_rank(layout: SampleLayout, threads: int) -> Any:
    """Device function (d, c, shared, least_key, largest_key, before, offset, by_count, thread): the candidate at an
    offset, of those with these keys, into `layout.chosen_token`; the mass up to it into `layout.mass_reached`.

    Args:
        before: mass and number of the tokens before them; `offset` includes them.
    """
    token_at = make_token_at(layout)
    capacity, size_entry = layout.capacity, layout.ranked_size
    keys, masses, chosen_token, mass_reached = layout.keys, layout.masses, layout.chosen_token, layout.mass_reached

    @ptx.device_function
    def copy_keys(d, c, shared, least_key, largest_key, thread):
        """Keys and masses to shared memory."""
        halves = cuda.shared.array(0, uint32)
        if thread == 0:
            shared[size_entry] = 0
        cuda.syncthreads()
        entry = c.start + thread
        while entry < c.end:
            token = token_at(c, entry)
            logit = penalised(d.logits, d.seen, token, d.penalty)
            key = key_of(d, token, logit)
            if in_range(distance_of(d, logit), c.nearest, c.farther) and key >= least_key and key <= largest_key:
                mass = mass_of(d, logit)
                if mass > 0:
                    index = int64(cuda.atomic.add(halves, 2 * size_entry, u32(1)))
                    if index < capacity:
                        shared[keys + index], shared[masses + index] = key, mass
            entry += threads
        cuda.syncthreads()

    @ptx.device_function
    def rank(d, c, shared, least_key, largest_key, before, offset, by_count, thread):
        copy_keys(d, c, shared, least_key, largest_key, thread)
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
            if sum_up_to < offset and sum_up_to + increment >= offset:
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
    find_candidates = make_find_candidates(vocabulary, layout, threads)
    narrow_down, rank = make_narrow_down(vocabulary, layout, threads), make_rank(layout, threads)
    first_reaching, counts = make_first_reaching(layout.bins), layout.counts

    @ptx.device_function
    def select(d, sums, shared, target, by_count, thread):
        bin_ = first_reaching(shared, counts if by_count else 0, target)
        bin_mass_before, bin_count_before = sum_before(shared, 0, bin_), sum_before(shared, counts, bin_)
        size = shared[counts + bin_] - bin_count_before
        offset = target - (bin_count_before if by_count else bin_mass_before)
        c = find_candidates(d, shared, bin_, thread)
        least_key, largest_key, mass_before, count_before = narrow_down(
            d, c, sums, shared, offset, size, by_count, thread
        )
        before = bin_mass_before + mass_before, bin_count_before + count_before
        rank(d, c, shared, least_key, largest_key, before, target, by_count, thread)

    return select
