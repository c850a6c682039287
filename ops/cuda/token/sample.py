"""Sampling on the device: temperature, top-k, top-p, min-p and the random draw, in one kernel.

`numba_atomflow/sampling.py` says what the options mean. They are read from device memory, and so is the state of the
random generator: one captured graph serves every request.

What the filters keep is always a prefix of the tokens in descending order of their keys (`order.py`), so all that is
needed of a filter is the probability mass that it keeps; the mass kept by all of them is the least. Mass is counted in
units of 2^-44 of the most likely token's: integers, whose sums do not depend on the order in which atomics add them.
Tokens below one unit are never drawn.

1. All CTAs make a histogram of mass and number over 2,048 bins of the logit, in device memory, each of a part of the
   vocabulary. The CTA that is done last (an atomic counter) goes on alone, and leaves the histogram as it was: zero.
2. Top-k, top-p and the draw each look for an offset in the order: the k-th token; where the mass reaches p; where the
   random number falls. The histogram gives the bin, and `sample_select.py` the token.

Without filters the order is that of the ids, and only the draw looks for an offset.

Sums are added in device memory, where L2 has atomics of 64 bits. In shared memory such an addition is a loop of
compare-and-swap, in which threads that add to the same bin wait for each other.

Cost, 128,256 tokens, H200, beyond a greedy graph's (docs/lab/2026-11-gpu-kernels.md): 27 us without filters; 41 to 116
us with any of them, unless thousands of logits are equal (0.8 to 2.1 ms). By count of instructions it should be a half
to a quarter of that: 3 us for the histogram, 3 us until it is in shared memory; then on one SM, for each offset:

- 8 us where ids are listed: 250 tokens per thread, 16 loads in flight, 7 instructions each (12 with a penalty);
- 2 us for up to 256 tokens that are ranked;
- 5 us more for up to 4,096 that are narrowed down by a digit; few bins need a second one;
- 15 to 100 us for each visit to the tokens of a bin that has more, which are three or four.
"""

import math
from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.cuda.token.order import (
    MIN_P,
    NON_FINITE_KEY,
    PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    penalised,
    token_id,
)
from numba_atomflow.ops.cuda.token.sample_histogram import make_add_to_histogram, make_take_histogram
from numba_atomflow.ops.cuda.token.sample_layout import MIN_P_SUMS, SampleLayout
from numba_atomflow.ops.cuda.token.sample_measures import BINS_PER_TEMPERATURE, Distribution
from numba_atomflow.ops.cuda.token.sample_select import make_select

THREADS = 512
LAYOUT = SampleLayout(bins=2048, capacity=256)

_TOKENS_PER_CTA = 2048
_TOP_K_STAGE, _TOP_P_STAGE, _DRAW_STAGE = range(3)


class SampleArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        logits: [V].
        seen: bitmap [ceil(V / 32)] of the tokens in the context.
        options: [5], see `order`.
        generator: [2]: seed and number of draws.
        best: [1], the arg-max's key.
        sums: [`SampleLayout.sums_words`], zero before and after.
        token: [1], the result.
    """

    logits: F32
    seen: U32
    options: F64
    generator: U64
    best: I64
    sums: I64
    token: I32


def make_sample(
    vocabulary: int,
    *,
    threads: int = THREADS,
    bins: int = LAYOUT.bins,
    capacity: int = LAYOUT.capacity,
    row_ctas: int = 0,
    dependent: bool = False,
) -> Any:
    """Kernel (`SampleArguments`): token[0] = the next token; a draw is counted.

    Launch: any number of CTAs of `threads` threads with `SampleLayout(bins, capacity).shared_bytes` of dynamic shared
    memory; `row_ctas` for each row, if that is not 0.

    Args:
        row_ctas: 0, or the CTAs of a row: then there are several rows of logits, each with arguments of its own, but
            for `options`.
    """
    layout = SampleLayout(bins, capacity)
    add_to_histogram = make_add_to_histogram(vocabulary, layout, threads)
    take_histogram = make_take_histogram(layout, threads)
    select = make_select(vocabulary, layout, threads)
    words, all_sums = -(-vocabulary // 32), layout.sums_words
    ctas_done, found_entry, min_p_sums = layout.ctas_done, layout.found_entry, layout.min_p_sums
    first_listed, last_listed = layout.first_listed_bin, layout.last_listed_bin
    chosen_token, mass_reached = layout.chosen_token, layout.mass_reached

    @ptx.device_function
    def of_row(io, row):
        """The arguments of one row."""
        return SampleArguments(
            io.logits[row * vocabulary : (row + 1) * vocabulary],
            io.seen[row * words : (row + 1) * words],
            io.options,
            io.generator[2 * row : 2 * row + 2],
            io.best[row : row + 1],
            io.sums[row * all_sums : (row + 1) * all_sums],
            io.token[row : row + 1],
        )

    @ptx.device_function
    def is_last(sums, shared, ctas, thread):
        """Whether all other CTAs have added what they had; for all threads."""
        # One thread fences for all that passed the barrier (fences are cumulative), before and after it is counted.
        cuda.syncthreads()
        if thread == 0:
            ptx.fence_gpu()
            shared[found_entry] = cuda.atomic.add(sums, ctas_done, 1)
            ptx.fence_gpu()
        cuda.syncthreads()
        return shared[found_entry] == ctas - 1

    @ptx.kernel(threads, 1)
    def sample(io):
        shared = cuda.shared.array(0, int64)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        thread, cta, ctas = cuda.threadIdx.x, cuda.blockIdx.x, cuda.gridDim.x
        if row_ctas:
            io = of_row(io, int64(cta // row_ctas))
            cta, ctas = cta % row_ctas, row_ctas
        temperature, top_k = io.options[TEMPERATURE], int64(io.options[TOP_K])
        top_p, min_p, penalty = io.options[TOP_P], io.options[MIN_P], f32(io.options[PENALTY])
        best_key = io.best[0]
        best_token = token_id(best_key)
        some_k = top_k > 0 and top_k < vocabulary
        most_likely = penalised(io.logits, io.seen, best_token, penalty)
        # +Inf and NaN leave no probabilities to draw from, nor does -Inf of all tokens.
        if temperature == 0.0 or top_k == 1 or best_key >= NON_FINITE_KEY or most_likely == f32(-math.inf):
            if thread == 0 and cta == 0:
                io.token[0] = best_token
            return
        by_id = not some_k and top_p >= 1.0 and min_p <= 0.0
        bins_per_logit = BINS_PER_TEMPERATURE / f32(temperature)
        exponent = float(most_likely) / temperature
        d = Distribution(io.logits, io.seen, penalty, most_likely, temperature, exponent, bins_per_logit, by_id)

        add_to_histogram(d, min_p, io.sums, cta, ctas, thread)
        if not is_last(io.sums, shared, ctas, thread):
            return
        if thread == 0:
            shared[first_listed], shared[last_listed] = 0, -1  # no list yet
        take_histogram(io.sums, shared, thread)
        total_mass, total_count = shared[bins - 1], shared[2 * bins - 1]

        kept_mass = total_mass  # mass that top-k leaves, then that all filters leave
        for stage in range(3):
            by_count = stage == _TOP_K_STAGE
            target = int64(0)  # 0: this filter is off
            if stage == _TOP_K_STAGE and some_k and top_k < total_count:
                target = top_k
            if stage == _TOP_P_STAGE and top_p < 1.0:
                target = min(max(int64(math.ceil(top_p * float(kept_mass))), int64(1)), kept_mass)
            if stage == _DRAW_STAGE:
                if min_p > 0.0:
                    min_p_mass = int64(0)
                    for i in range(MIN_P_SUMS):
                        min_p_mass += shared[min_p_sums + i]
                    kept_mass = min(kept_mass, min_p_mass)
                uniform = float(ptx.random_53_bits(io.generator[0], io.generator[1])) * 2.0**-53
                target = min(int64(uniform * float(kept_mass)) + 1, kept_mass)
            if target > 0:
                select(d, io.sums, shared, target, by_count, thread)
                if stage < _DRAW_STAGE:
                    # Later filters see what earlier ones kept; min-p's mass is taken from the whole order.
                    kept_mass = min(kept_mass, shared[mass_reached])
        if thread == 0:
            io.token[0] = shared[chosen_token]
            io.generator[1] += 1

    return sample


def sample_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_sample`."""
    shared_bytes, options = LAYOUT.shared_bytes, {"vocabulary": vocabulary, "dependent": dependent}
    spec = kernel_spec("sample", make_sample, SampleArguments, THREADS, shared_bytes, **options)
    return Planned(spec, -(-vocabulary // _TOKENS_PER_CTA))


def sample_rows_kernel(vocabulary: int, dependent: bool) -> Planned:
    """The same for several rows, and its CTAs for each."""
    shared_bytes, ctas = LAYOUT.shared_bytes, sample_kernel(vocabulary, dependent).ctas
    options = {"vocabulary": vocabulary, "dependent": dependent, "row_ctas": ctas}
    return Planned(kernel_spec("sample_rows", make_sample, SampleArguments, THREADS, shared_bytes, **options), ctas)
