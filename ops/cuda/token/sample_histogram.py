"""The histogram of the sampling kernel (`sample.py`): all CTAs add to sums in L2, one takes them as running sums."""

from typing import Any

from numba import cuda, float32, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.token.sample_layout import MIN_P_SUMS, SampleLayout
from numba_atomflow.ops.cuda.token.sample_measures import UNIT, make_bin_of, make_load_logits, mass_of

_IN_FLIGHT = 4  # logits that a thread loads at a time


def make_add_to_histogram(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, min_p, sums, cta, ctas, thread): add a CTA's part of the vocabulary to the histogram."""
    bin_of = make_bin_of(vocabulary, layout.bins)
    load_logits = make_load_logits(vocabulary, _IN_FLIGHT, clamped=True)
    counts_start, min_p_sums = layout.counts, layout.min_p_sums

    @ptx.device_function
    def add_to_histogram(d, min_p, sums, cta, ctas, thread):
        logits = cuda.local.array(_IN_FLIGHT, float32)
        token, stride = int64(cta * threads + thread), int64(ctas * threads)
        while token < vocabulary:
            load_logits(d, token, stride, logits)
            for i in range(_IN_FLIGHT):
                mass = mass_of(d, logits[i]) if token < vocabulary else int64(0)
                if mass > 0:
                    bin_ = bin_of(d, token, logits[i])
                    cuda.atomic.add(sums, bin_, mass)
                    cuda.atomic.add(sums, counts_start + bin_, 1)
                    if min_p > 0.0 and float(mass) >= min_p * UNIT:
                        cuda.atomic.add(sums, min_p_sums + thread % MIN_P_SUMS, mass)
                token += stride

    return add_to_histogram


def make_take_histogram(layout: SampleLayout, threads: int) -> Any:
    """Device function (sums, shared, thread): move the histogram into shared memory, as running sums, and what min-p
    keeps; `sums` is zero then.
    """
    take_running_sums = make_take_running_sums(0, layout.counts, layout.bins, threads)
    min_p_sums, ctas_done = layout.min_p_sums, layout.ctas_done

    @ptx.device_function
    def take_histogram(sums, shared, thread):
        if thread == 0:
            sums[ctas_done] = 0
        if thread < MIN_P_SUMS:
            shared[min_p_sums + thread] = ptx.load_relaxed_i64(sums, min_p_sums + thread)
            sums[min_p_sums + thread] = 0
        take_running_sums(sums, shared, thread)

    return take_histogram


def make_take_running_sums(masses: int, counts: int, size: int, threads: int) -> Any:
    """Device function (sums, shared, thread): move `size` masses and numbers from L2 to the same places of shared
    memory, where each has become the sum up to and including its own; `sums` is zero there then.

    Called behind a barrier and `ptx.fence_gpu` of those that have added to `sums`; ends with a barrier. Each thread
    adds up some neighbours; the totals of the threads before it are found in log2(threads) rounds.
    """
    each = max(1, size // threads)
    owners = size // each  # threads that have entries

    @ptx.device_function
    def take_running_sums(sums, shared, thread):
        own_masses, own_counts = cuda.local.array(each, int64), cuda.local.array(each, int64)
        first = thread * each
        if thread < owners:
            for i in range(each):  # all loads are in flight together
                own_masses[i] = ptx.load_relaxed_i64(sums, masses + first + i)
                own_counts[i] = ptx.load_relaxed_i64(sums, counts + first + i)
            mass, count = int64(0), int64(0)
            for i in range(each):
                sums[masses + first + i] = 0
                sums[counts + first + i] = 0
                mass += own_masses[i]
                count += own_counts[i]
                shared[masses + first + i] = mass
                shared[counts + first + i] = count
        total = first + each - 1  # the entry that has the thread's total
        distance = 1
        while distance < owners:
            cuda.syncthreads()
            mass, count = int64(0), int64(0)
            if distance <= thread < owners:
                mass, count = shared[masses + total - distance * each], shared[counts + total - distance * each]
            cuda.syncthreads()
            if distance <= thread < owners:
                shared[masses + total] += mass
                shared[counts + total] += count
            distance *= 2
        cuda.syncthreads()
        if 0 < thread < owners:
            for i in range(each - 1):
                shared[masses + first + i] += shared[masses + first - 1]
                shared[counts + first + i] += shared[counts + first - 1]
        cuda.syncthreads()

    return take_running_sums


def make_first_reaching(size: int) -> Any:
    """Device function (shared, running, target): the first of `size` running sums from `running` on that reaches
    `target`; the last one if none does. `size`: a power of two.
    """
    steps = size.bit_length() - 1

    @ptx.device_function
    def first_reaching(shared, running, target):
        entry = int64(0)
        for i in range(steps):
            half = size >> (i + 1)
            if shared[running + entry + half - 1] < target:
                entry += half
        return entry

    return first_reaching


@ptx.device_function
def sum_before(shared, running, entry):
    """The sum of the entries before this one."""
    return shared[running + entry - 1] if entry > 0 else int64(0)
