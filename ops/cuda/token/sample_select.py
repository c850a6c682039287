"""The selection of a token in the sampling kernel (`sample.py`), by one CTA: the histogram and what is found in it.

The k-th token, the token with which the mass reaches p, and the one that is drawn are each an offset in the order of
the tokens. The histogram gives the bin of an offset. The bin's tokens are then listed and ranked among themselves; if
they are too many for shared memory (equal logits), a radix select on digits of the key narrows them down first.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32, u32
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, KEY_BITS, penalise, penalised, rank, token_id

UNIT = float(2**44)  # of mass: its inverse is the most likely token's
BINS_PER_TEMPERATURE = f32(64.0)  # 2,048 bins reach down to e^-32, below one unit
_DIGIT_BITS, _DIGITS = 8, 256
_STRIDE = 32  # bins that one thread adds up
_MIN_P_SUMS = 32  # of what min-p keeps: lanes add to different ones
_IN_FLIGHT = 16  # logits that a thread loads at a time


class Distribution(NamedTuple):
    """What a token's mass and key are computed from.

    Attributes:
        bins_per_logit: the histogram's resolution.
        by_id: the order is that of the ids.
    """

    logits: Any
    seen: Any
    penalty: Any
    most_likely: Any
    temperature: Any
    bins_per_logit: Any
    by_id: Any


@dataclass(frozen=True)
class SampleLayout:
    """Where things are in shared memory and in `SampleArguments.sums`, both int64.

    Shared memory: masses and numbers of the histogram, of the digits, and of strides of 32 bins; keys and masses of the
    listed tokens; scalars. `sums` has the same order up to the digits, then what min-p keeps, and the CTAs that are
    done.

    Args:
        bins: of the histogram, a multiple of 32. capacity: tokens that are ranked in shared memory.
    """

    bins: int
    capacity: int

    @property
    def strides(self) -> int:
        return self.bins // _STRIDE

    @property
    def counts(self) -> int:
        return self.bins

    @property
    def digits(self) -> int:
        return 2 * self.bins

    @property
    def digit_counts(self) -> int:
        return self.digits + _DIGITS

    @property
    def stride_masses(self) -> int:
        return self.digit_counts + _DIGITS

    @property
    def stride_counts(self) -> int:
        return self.stride_masses + self.strides

    @property
    def keys(self) -> int:
        return self.stride_counts + self.strides

    @property
    def masses(self) -> int:
        return self.keys + self.capacity

    @property
    def scalars(self) -> int:
        return self.masses + self.capacity

    @property
    def found_entry(self) -> int:
        return self.scalars + 2

    @property
    def min_p_mass(self) -> int:
        return self.scalars + 4

    @property
    def chosen_token(self) -> int:
        return self.scalars + 5

    @property
    def mass_reached(self) -> int:
        return self.scalars + 6

    @property
    def shared_bytes(self) -> int:
        return 8 * (self.scalars + 8)

    @property
    def min_p_sums(self) -> int:
        """Of `sums`, as what follows."""
        return self.digits + 2 * _DIGITS

    @property
    def ctas_done(self) -> int:
        return self.min_p_sums + _MIN_P_SUMS

    @property
    def sums_words(self) -> int:
        return self.ctas_done + 2


class Measures(NamedTuple):
    """Device functions: bin_of(d, token, logit), mass_of(d, logit), key_of(d, token, logit)."""

    bin_of: Any
    mass_of: Any
    key_of: Any


def make_measures(vocabulary: int, bins: int) -> Measures:
    """What is known of a token."""
    id_shift, last_bin = _id_shift(vocabulary, bins), bins - 1

    @ptx.device_function
    def bin_of(d, token, logit):
        """The token's bin of the histogram; without mass, NaN and -infinity among them, the last one."""
        distance = max((d.most_likely - logit) * d.bins_per_logit, f32(0.0))
        nearness = int64(distance) if distance < f32(last_bin) else int64(last_bin)
        return token >> id_shift if d.by_id else nearness

    @ptx.device_function
    def mass_of(d, logit):
        """Probability in units of 2^-44 of the most likely token's."""
        exponent = float(logit) / d.temperature - float(d.most_likely) / d.temperature
        return int64(math.exp(exponent) * UNIT) if exponent > -40.0 else int64(0)

    @ptx.device_function
    def key_of(d, token, logit):
        """The larger it is, the earlier comes the token in the order."""
        return (int64(0) if d.by_id else rank(logit) << ID_BITS) | (ID_MASK - token)

    return Measures(bin_of, mass_of, key_of)


def _id_shift(vocabulary: int, bins: int) -> int:
    """Bits of an id that its bin lacks: ids fall into bins in their own order."""
    return max(0, (vocabulary - 1).bit_length() - bins.bit_length() + 1)


def make_add_to_histogram(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, min_p, sums, cta, ctas, thread): add a CTA's part of the vocabulary to the histogram."""
    bin_of, mass_of, _ = make_measures(vocabulary, layout.bins)
    counts_start, min_p_sums = layout.counts, layout.min_p_sums

    @ptx.device_function
    def add_to_histogram(d, min_p, sums, cta, ctas, thread):
        token = int64(cta * threads + thread)
        while token < vocabulary:
            logit = penalised(d.logits, d.seen, token, d.penalty)
            mass = mass_of(d, logit)
            if mass > 0:
                bin_ = bin_of(d, token, logit)
                cuda.atomic.add(sums, bin_, mass)
                cuda.atomic.add(sums, counts_start + bin_, 1)
                if min_p > 0.0 and float(mass) >= min_p * UNIT:
                    cuda.atomic.add(sums, min_p_sums + thread % _MIN_P_SUMS, mass)
            token += ctas * threads

    return add_to_histogram


def make_take_histogram(layout: SampleLayout, threads: int) -> Any:
    """Device function (min_p, sums, shared, thread): move the histogram into shared memory; `sums` is zero then."""
    bins, strides, counts_start, ctas_done = layout.bins, layout.strides, layout.counts, layout.ctas_done
    strides_start, stride_counts_start = layout.stride_masses, layout.stride_counts
    min_p_sums, min_p_mass = layout.min_p_sums, layout.min_p_mass
    take_sums = _make_take_sums(threads)

    @ptx.device_function
    def take_histogram(min_p, sums, shared, thread):
        if thread == 0:
            sums[ctas_done] = 0
            shared[min_p_mass] = 0
        take_sums(sums, 0, 2 * bins, shared, thread)
        cuda.syncthreads()
        if min_p > 0.0 and thread < _MIN_P_SUMS:
            cuda.atomic.add(shared, min_p_mass, cuda.atomic.exch(sums, min_p_sums + thread, int64(0)))
        entry = thread
        while entry < strides:
            mass, count = int64(0), int64(0)
            for i in range(_STRIDE):
                mass += shared[entry * _STRIDE + i]
                count += shared[counts_start + entry * _STRIDE + i]
            shared[strides_start + entry] = mass
            shared[stride_counts_start + entry] = count
            entry += threads
        cuda.syncthreads()

    return take_histogram


def _make_take_sums(threads: int) -> Any:
    @ptx.device_function
    def take_sums(sums, start, size, shared, thread):
        """Move sums into shared memory; zeros are left."""
        entry = start + thread
        while entry < start + size:
            shared[entry] = cuda.atomic.exch(sums, entry, int64(0))
            entry += threads

    return take_sums


def make_select(vocabulary: int, layout: SampleLayout, threads: int) -> Any:
    """Device function (d, sums, shared, target, by_count, thread): find the token with which the running sum of the
    order reaches `target`, a number of tokens if `by_count`, else a mass: into `layout.chosen_token`; and the mass up
    to it, `layout.mass_reached`.
    """
    bin_of, mass_of, key_of = make_measures(vocabulary, layout.bins)
    take_sums = _make_take_sums(threads)
    id_shift, capacity, strides = _id_shift(vocabulary, layout.bins), layout.capacity, layout.strides
    counts_start, digits_start, digit_counts_start = layout.counts, layout.digits, layout.digit_counts
    strides_start, stride_counts_start = layout.stride_masses, layout.stride_counts
    keys_start, masses_start = layout.keys, layout.masses
    mass_before, count_before, list_size = layout.scalars, layout.scalars + 1, layout.scalars + 3
    found_entry, chosen_token, mass_reached = layout.found_entry, layout.chosen_token, layout.mass_reached

    @ptx.device_function
    def first_reaching(shared, masses, counts, size, target, by_count):
        """The first of `size` entries with which the running sum reaches `target`; thread 0 only.

        mass_before and count_before grow by the entries before it.
        """
        mass, count = shared[mass_before], shared[count_before]
        entry, searching = 0, True
        while searching and entry < size - 1:
            next_mass, next_count = mass + shared[masses + entry], count + shared[counts + entry]
            searching = (next_count if by_count else next_mass) < target
            if searching:
                mass, count, entry = next_mass, next_count, entry + 1
        shared[mass_before], shared[count_before] = mass, count
        return entry

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
    def candidates(d, selected_bin):
        """The range of ids that has all tokens of a bin."""
        if d.by_id:
            return selected_bin << id_shift, min((selected_bin + 1) << id_shift, int64(vocabulary))
        return int64(0), int64(vocabulary)

    @ptx.device_function
    def in_bin(d, selected_bin, token, end):
        """Which of the tokens `token + i * threads` below `end` are in the bin: bit i."""
        logits, found = cuda.local.array(_IN_FLIGHT, float32), int64(0)
        for i in range(_IN_FLIGHT):  # all loads come before any branch
            logits[i] = d.logits[min(token + i * threads, int64(vocabulary - 1))]
        for i in range(_IN_FLIGHT):
            other = min(token + i * threads, int64(vocabulary - 1))
            logit = penalise(logits[i], d.seen[other // 32], other, d.penalty)
            if token + i * threads < end and bin_of(d, other, logit) == selected_bin:
                found |= int64(1) << i
        return found

    @ptx.device_function
    def add_digits(d, sums, selected_bin, shift, prefix, thread):
        """Mass and number per digit, of the bin's tokens whose key begins with `prefix`."""
        token, end = candidates(d, selected_bin)
        token += thread
        while token < end:
            found, other = in_bin(d, selected_bin, token, end), token
            while found != 0:
                if found & 1:
                    logit = penalised(d.logits, d.seen, other, d.penalty)
                    mass, key = mass_of(d, logit), key_of(d, other, logit)
                    if mass > 0 and key >> (shift + _DIGIT_BITS) == prefix:
                        digit = _DIGITS - 1 - ((key >> shift) & (_DIGITS - 1))
                        cuda.atomic.add(sums, digits_start + digit, mass)
                        cuda.atomic.add(sums, digit_counts_start + digit, 1)
                found >>= 1
                other += threads
            token += _IN_FLIGHT * threads

    @ptx.device_function
    def narrow_down(d, sums, shared, selected_bin, target, by_count, thread):
        """Radix select: while too many tokens share the bin, narrow them down by a digit, the largest first.

        Returns shift and prefix: the tokens that are left are those with `key >> shift == prefix`.
        """
        shift, prefix = int64(KEY_BITS), int64(0)
        while shared[list_size] > capacity:
            shift -= _DIGIT_BITS
            add_digits(d, sums, selected_bin, shift, prefix, thread)
            ptx.fence_gpu()
            cuda.syncthreads()
            take_sums(sums, digits_start, 2 * _DIGITS, shared, thread)
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
        halves = cuda.shared.array(0, uint32)  # the same memory: an atomic of 32 bits is one instruction
        cuda.syncthreads()
        if thread == 0:
            shared[list_size] = 0
        cuda.syncthreads()
        token, end = candidates(d, selected_bin)
        token += thread
        while token < end:
            found, other = in_bin(d, selected_bin, token, end), token
            while found != 0:
                if found & 1:
                    logit = penalised(d.logits, d.seen, other, d.penalty)
                    mass, key = mass_of(d, logit), key_of(d, other, logit)
                    if mass > 0 and key >> shift == prefix:
                        index = int64(cuda.atomic.add(halves, 2 * list_size, u32(1)))
                        if index < capacity:
                            shared[keys_start + index] = key
                            shared[masses_start + index] = mass
                found >>= 1
                other += threads
            token += _IN_FLIGHT * threads
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

    @ptx.device_function
    def select(d, sums, shared, target, by_count, thread):
        selected_bin = find_bin(shared, target, by_count, thread)
        shift, prefix = narrow_down(d, sums, shared, selected_bin, target, by_count, thread)
        size = list_tokens(d, shared, selected_bin, shift, prefix, thread)
        choose(shared, size, target, by_count, thread)

    return select
