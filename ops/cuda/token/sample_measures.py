"""What the sampling kernel (`sample.py`) knows of a token: its logit, and from it distance, bin, mass and key."""

import math
from typing import Any, NamedTuple

from numba import cuda, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32, u64
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, penalise, rank

UNIT = float(2**44)  # of mass: its inverse is the most likely token's
BINS_PER_TEMPERATURE = f32(64.0)  # 2,048 bins reach down to e^-32, below one unit


class Distribution(NamedTuple):
    """What a token's mass and key are computed from.

    Attributes:
        logits, seen: as in `SampleArguments`.
        penalty: of tokens in the context.
        most_likely: the largest logit, after the penalty. likely_exponent: the same divided by the temperature.
        bins_per_logit: the histogram's resolution.
        by_id: the order is that of the ids.
    """

    logits: Any
    seen: Any
    penalty: Any
    most_likely: Any
    temperature: Any
    likely_exponent: Any
    bins_per_logit: Any
    by_id: Any


@ptx.device_function
def distance_of(d, logit):
    """How far the logit is from the most likely token's, in bins; 0 or more, +Inf for -Inf."""
    return (d.most_likely - logit) * d.bins_per_logit


@ptx.device_function
def mass_of(d, logit):
    """Probability in units of 2^-44 of the most likely token's."""
    exponent = float(logit) / d.temperature - d.likely_exponent
    return int64(math.exp(exponent) * UNIT) if exponent > -40.0 else int64(0)


@ptx.device_function
def key_of(d, token, logit):
    """The larger it is, the earlier comes the token in the order."""
    return (int64(0) if d.by_id else rank(logit) << ID_BITS) | (ID_MASK - token)


def id_shift(vocabulary: int, bins: int) -> int:
    """Bits of an id that its bin lacks: ids fall into bins in their own order."""
    return max(0, (vocabulary - 1).bit_length() - bins.bit_length() + 1)


def make_bin_of(vocabulary: int, bins: int) -> Any:
    """Device function (d, token, logit): the token's bin of the histogram; if it has no mass, the last one."""
    shift, last_bin = id_shift(vocabulary, bins), bins - 1

    @ptx.device_function
    def bin_of(d, token, logit):
        distance = distance_of(d, logit)
        nearness = max(int64(distance), int64(0)) if distance < f32(last_bin) else int64(last_bin)
        return token >> shift if d.by_id else nearness

    return bin_of


def make_load_logits(vocabulary: int, count: int, *, clamped: bool) -> Any:
    """Device function (d, token, stride, logits): logits[i] of `count` is that of `token + i * stride`, after the
    penalty. All loads come before any branch. `stride`: a multiple of 32.

    Args:
        clamped: ids from the vocabulary's end on are taken for the last one; else there must be none.
    """
    last_token = vocabulary - 1

    @ptx.device_function
    def index_of(first, step, i, last):
        """An unsigned number: an index of that kind is not compared with 0."""
        index = first + i * step
        return u64(min(index, int64(last)) if clamped else index)

    @ptx.device_function
    def load_logits(d, token, stride, logits):
        for i in range(count):
            logits[i] = d.logits[index_of(token, stride, i, last_token)]
        if d.penalty != f32(1.0):
            words = cuda.local.array(count, uint32)
            for i in range(count):
                words[i] = d.seen[index_of(token >> 5, stride >> 5, i, last_token >> 5)]
            for i in range(count):
                logits[i] = penalise(logits[i], words[i], token & 31, d.penalty)  # the same bit of each word

    return load_logits
