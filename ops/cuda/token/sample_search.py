"""Where the sampling kernel (`sample.py`) looks for the tokens of a bin: in a list of ids, or in the vocabulary.

A search of the vocabulary compares distances in float32, with many loads in flight, and visits the tokens that are in
the bin; no more than that is computed of the others. Most bins need one such search: it lists the ids in shared
memory. If the tokens of all earlier bins fit into the list as well, they are listed too: later offsets are never
farther down, and need no search. Bins of more tokens (equal logits, high temperatures) are searched whenever their
tokens are visited.

Without filters a bin is a range of ids, and needs no search.
"""

import math
from typing import Any, NamedTuple

from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32, u32
from numba_atomflow.ops.cuda.token.order import penalised
from numba_atomflow.ops.cuda.token.sample_histogram import sum_before
from numba_atomflow.ops.cuda.token.sample_layout import SampleLayout
from numba_atomflow.ops.cuda.token.sample_measures import distance_of, id_shift, make_load_logits

_IN_FLIGHT = 16  # logits that a thread loads at a time


class Bin(NamedTuple):
    """Where the tokens of a bin are.

    Attributes:
        listed: the list has them.
        start, end: entries of the list, if they are listed; ids, if ids are the order; else not used.
        nearest, farther: their distances, float32: from `nearest` on, below `farther`.
    """

    listed: Any
    start: Any
    end: Any
    nearest: Any
    farther: Any


class Visit(NamedTuple):
    """What a visit to a token uses, beside the distribution.

    Attributes:
        sums, shared: of the kernel.
        least_key, largest_key: of the tokens that count. shift: of the digit.
        extremes: [2], local: the least and the largest rank that the thread has seen.
    """

    sums: Any
    shared: Any
    least_key: Any
    largest_key: Any
    shift: Any
    extremes: Any


def make_distances(bins: int) -> Any:
    """Device function (bin): distances of its tokens, `nearest` and `farther`. Those of -Inf are in no bin."""

    @ptx.device_function
    def distances(bin_):
        nearest = f32(bin_) if bin_ > 0 else f32(-math.inf)
        return nearest, (f32(bin_ + 1) if bin_ < bins - 1 else f32(math.inf))

    return distances


def make_search(vocabulary: int, threads: int, visit: Any) -> Any:
    """Device function (d, nearest, farther, v, thread): visit each token whose distance is from `nearest` on and below
    `farther`.

    Args:
        visit: device function (d, v, token, logit); v: `Visit`.
    """
    in_flight = max(1, min(_IN_FLIGHT, vocabulary // threads))
    batch, last_begin = in_flight * threads, max(0, vocabulary - in_flight * threads)
    load_logits = make_load_logits(vocabulary, in_flight, clamped=False)

    @ptx.device_function
    def search(d, nearest, farther, v, thread):
        logits = cuda.local.array(in_flight, float32)
        begin = int64(0)
        while begin < vocabulary:
            # The last batch begins early enough to be whole; what the one before it had is left out.
            token = min(begin, int64(last_begin)) + min(thread, vocabulary - 1)
            load_logits(d, token, threads, logits)
            found = u32(0)
            for i in range(in_flight):
                distance = distance_of(d, logits[i])
                if distance >= nearest and distance < farther:
                    found = u32(found | (1 << i))
            while found != 0:
                other = token + (cuda.ffs(found) - 1) * threads
                found = u32(found & (found - 1))
                if other >= begin and thread < vocabulary:
                    visit(d, v, other, penalised(d.logits, d.seen, other, d.penalty))
            begin += batch

    return search


def make_for_each(vocabulary: int, layout: SampleLayout, threads: int, visit: Any) -> Any:
    """Device function (d, b, v, thread): visit each token of a bin.

    Args:
        visit: as of `make_search`.
    """
    search, ids_start = make_search(vocabulary, threads, visit), 2 * layout.ids

    @ptx.device_function
    def for_each(d, b, v, thread):
        if b.listed or d.by_id:
            halves = cuda.shared.array(0, uint32)  # the same memory
            entry = b.start + thread
            while entry < b.end:
                token = int64(halves[ids_start + entry]) if b.listed else entry
                logit = penalised(d.logits, d.seen, token, d.penalty)
                distance = distance_of(d, logit)
                if distance >= b.nearest and distance < b.farther:
                    visit(d, v, token, logit)
                entry += threads
        else:
            search(d, b.nearest, b.farther, v, thread)

    return for_each


def make_list_bins(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, v, first_bin, last_bin, thread): list the ids of these bins, in any order.

    If they are too many - beside tokens that have been counted there may be some whose mass is 0 - none is listed.
    """
    distances = make_distances(layout.bins)
    ids_start, size_entry, capacity = 2 * layout.ids, layout.list_size, layout.list_capacity
    first_listed, last_listed = layout.first_listed_bin, layout.last_listed_bin

    @ptx.device_function
    def add_id(d, v, token, logit):
        halves = cuda.shared.array(0, uint32)
        index = int64(cuda.atomic.add(halves, 2 * size_entry, u32(1)))
        if index < capacity:
            halves[ids_start + index] = u32(token)

    search = make_search(vocabulary, threads, add_id)

    @ptx.device_function
    def list_bins(d, v, first_bin, last_bin, thread):
        nearest, _ = distances(first_bin)
        _, farther = distances(last_bin)
        cuda.syncthreads()
        if thread == 0:
            v.shared[size_entry] = 0
        cuda.syncthreads()
        search(d, nearest, farther, v, thread)
        cuda.syncthreads()
        if thread == 0:
            fits = v.shared[size_entry] <= capacity
            v.shared[first_listed], v.shared[last_listed] = first_bin if fits else 0, last_bin if fits else -1
        cuda.syncthreads()

    return list_bins


def make_find_tokens(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, v, bin, thread) -> `Bin`; its ids have been listed if that is of use."""
    list_bins, distances = make_list_bins(vocabulary, layout, threads), make_distances(layout.bins)
    shift, capacity, counts = id_shift(vocabulary, layout.bins), layout.list_capacity, layout.counts
    first_listed, last_listed, list_size = layout.first_listed_bin, layout.last_listed_bin, layout.list_size

    @ptx.device_function
    def is_listed(shared, bin_):
        return shared[first_listed] <= bin_ and bin_ <= shared[last_listed]

    @ptx.device_function
    def find_tokens(d, v, bin_, thread):
        if d.by_id:
            end = min((bin_ + 1) << shift, int64(vocabulary))
            return Bin(False, bin_ << shift, end, f32(-math.inf), f32(math.inf))
        first_bin = int64(0) if v.shared[counts + bin_] <= capacity else bin_
        size = v.shared[counts + bin_] - sum_before(v.shared, counts, first_bin)
        if size <= capacity and not is_listed(v.shared, bin_):
            list_bins(d, v, first_bin, bin_, thread)
        nearest, farther = distances(bin_)
        return Bin(is_listed(v.shared, bin_), int64(0), v.shared[list_size], nearest, farther)

    return find_tokens
