"""Statistics of repeated measurements."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LARGEST = 1e100  # of values from a file, so that ratios are finite


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of `count` values, with their 10th and 90th percentile."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one or more values; percentiles are interpolated linearly."""
        values = list(values)
        low, median, high = np.percentile(values, [10, 50, 90]).tolist()
        return cls(median, low, high, len(values))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; KeyError, TypeError or ValueError if it is no such record."""
        values = [record["median"], record["low"], record["high"]]
        count = record["count"]
        if not all(type(value) in (int, float) and 0 < value <= _LARGEST for value in (*values, count)):
            raise ValueError("a quantity that is no positive number")
        median, low, high = (float(value) for value in values)
        return cls(median, low, high, int(count))

    def to_dict(self) -> dict[str, float]:
        """A JSON-ready record."""
        return asdict(self)

    def ratio_to(self, other: "Spread") -> "Spread":
        """The ratio to another quantity, with the least and the greatest ratio of the two ranges."""
        return Spread(
            self.median / other.median, self.low / other.high, self.high / other.low, min(self.count, other.count)
        )

    def text(self, digits: int, factor: float = 1.0) -> str:
        """As text: ``12.3 (12.1-12.8)``."""
        median, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} ({low}-{high})"


def faster_half(runs: ArrayLike) -> NDArray[np.float64]:
    """Undisturbed time of each part of a run: the mean over the runs [runs, parts] that are not slower than the median.

    Unlike medians of parts, the results add up to the same mean of the whole runs.
    """
    seconds = np.asarray(runs, np.float64)
    totals = seconds.sum(axis=1)
    mean: NDArray[np.float64] = seconds[totals <= np.median(totals)].mean(axis=0)
    return mean
