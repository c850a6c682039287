"""Where the sampling kernel (`sample.py`) has its histogram and its lists."""

from dataclasses import dataclass

DIGIT_BITS, DIGITS = 8, 256
MIN_P_SUMS = 32  # of what min-p keeps: lanes add to different ones
_LISTED_PER_RANKED = 16


@dataclass(frozen=True)
class SampleLayout:
    """Where things are in shared memory and in `SampleArguments.sums`, in words of 8 bytes.

    Shared memory: masses and numbers of the histogram and of the digits, as running sums; what min-p keeps; keys and
    masses of the ranked tokens; the listed ids, two in a word; scalars. `sums` has the same order up to what min-p
    keeps, then the CTAs that are done.

    Args:
        bins: of the histogram, a power of two, 32 or more.
        capacity: tokens that are ranked in shared memory, an even number.
    """

    bins: int
    capacity: int

    @property
    def list_capacity(self) -> int:
        """Ids that are listed in shared memory."""
        return _LISTED_PER_RANKED * self.capacity

    @property
    def counts(self) -> int:
        """Masses of the histogram are at 0."""
        return self.bins

    @property
    def digits(self) -> int:
        return 2 * self.bins

    @property
    def digit_counts(self) -> int:
        return self.digits + DIGITS

    @property
    def min_p_sums(self) -> int:
        return self.digit_counts + DIGITS

    @property
    def ctas_done(self) -> int:
        """Of `sums` only; what follows is in shared memory only."""
        return self.min_p_sums + MIN_P_SUMS

    @property
    def sums_words(self) -> int:
        return self.ctas_done + 2

    @property
    def keys(self) -> int:
        return self.min_p_sums + MIN_P_SUMS

    @property
    def masses(self) -> int:
        return self.keys + self.capacity

    @property
    def ids(self) -> int:
        return self.masses + self.capacity

    @property
    def first_listed_bin(self) -> int:
        return self.ids + self.list_capacity // 2

    @property
    def last_listed_bin(self) -> int:
        return self.first_listed_bin + 1

    @property
    def list_size(self) -> int:
        return self.first_listed_bin + 2

    @property
    def ranked_size(self) -> int:
        return self.first_listed_bin + 3

    @property
    def rank_range(self) -> int:
        """The least and the largest rank (`order.rank`), uint32, in one word."""
        return self.first_listed_bin + 4

    @property
    def found_entry(self) -> int:
        return self.first_listed_bin + 5

    @property
    def chosen_token(self) -> int:
        return self.first_listed_bin + 6

    @property
    def mass_reached(self) -> int:
        return self.first_listed_bin + 7

    @property
    def shared_bytes(self) -> int:
        return 8 * (self.first_listed_bin + 8)
