"""Scalings of RoPE: how a model's rotary frequencies differ from powers of its base, by ``rope_type``.

Each has the formula of transformers (`modeling_rope_utils`), in float64. Where the frequencies depend on the length of
the sequence (dynamic, longrope), they are those of `length`, the positions of the KV cache: keys that were rotated once
stay as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import GeometryError
from numba_atomflow.files.untrusted import quote, short

Frequencies = NDArray[np.float64]  # [rotated pairs], radians per position
LARGEST_COUNT = 2**63 - 1  # kernels compute in int64
_YARN_FAST, _YARN_SLOW = 32.0, 1.0  # turns over the original context, as in the paper


def check_count(name: str, value: object) -> None:
    """Check that `value` is an integer (a float or a bool that equals one is none) from 1 to `LARGEST_COUNT`.

    Raises:
        GeometryError: it is not.
    """
    if type(value) is not int or not 1 <= value <= LARGEST_COUNT:
        raise GeometryError(f"The model's {name} is {quote(value)}; it must be a whole number, at least 1.")


def check_number(name: str, value: object) -> None:
    """Check that `value` is a positive finite float.

    Raises:
        GeometryError: it is not.
    """
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise GeometryError(f"The model's {name} is {quote(value)}; it must be a positive finite number.")


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of RoPE.

    Attributes:
        KIND: ``rope_type`` of config.json.
        factor: by how much the context grows.

    Raises:
        GeometryError: a field is of a wrong type or out of range.
    """

    factor: float
    KIND: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "original_max_positions":
                check_count(f"rope_scaling.{name}", value)
            elif isinstance(value, tuple):
                for element in value:
                    check_number(f"rope_scaling.{name}", element)
            elif name == "truncate":
                if not isinstance(value, bool):
                    raise GeometryError(f"The model's rope_scaling.{name} is {quote(value)}; it must be true or false.")
            else:
                check_number(f"rope_scaling.{name}", value)

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        """The scaled frequencies.

        Args:
            plain: theta^(-2 i / d), for d rotated elements of a head.
            theta: the base.
            length: positions of the sequence.
        """
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """By which cosines and sines are multiplied."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record with its kind."""
        return {"kind": self.KIND} | asdict(self)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3: long wavelengths are divided by the factor, short ones are unchanged, those between are blended."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    KIND = "llama3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise GeometryError(
                f"The model's rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above its "
                f"low_freq_factor, {self.low_freq_factor}."
            )

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        del theta, length
        turns = self.original_max_positions * plain / (2 * math.pi)  # full turns over the original context
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blended(plain, np.clip(blend, 0.0, 1.0), self.factor)


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions are divided by the factor."""

    KIND = "linear"

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        del theta, length
        return plain / self.factor


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """NTK-aware: beyond the original context, the base grows with the length."""

    original_max_positions: int
    KIND = "dynamic"

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        del theta
        pairs = len(plain)
        if length <= self.original_max_positions or pairs < 2:
            return plain
        growth = self.factor * length / self.original_max_positions - (self.factor - 1)
        return plain * growth ** (-np.arange(pairs) / (pairs - 1))


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN: as Llama 3, with a ramp over the pairs instead of the wavelengths, and an attention factor.

    Attributes:
        beta_fast, beta_slow: turns over the original context at the two ends of the ramp.
        truncate: the ends are rounded to whole pairs.
    """

    original_max_positions: int
    attention_factor: float
    beta_fast: float = _YARN_FAST
    beta_slow: float = _YARN_SLOW
    truncate: bool = True
    KIND = "yarn"

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        del length
        low, high = self._pair_of(self.beta_fast, theta, len(plain)), self._pair_of(self.beta_slow, theta, len(plain))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(plain) - 1)
        ramp = (np.arange(len(plain)) - low) / (high - low if high != low else 0.001)
        return _blended(plain, 1.0 - np.clip(ramp, 0.0, 1.0), self.factor)

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def _pair_of(self, turns: float, theta: float, pairs: int) -> float:
        """The pair, as a fraction, that makes so many turns over the original context."""
        return pairs * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    @staticmethod
    def default_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
        """The attention factor of a config that gives none."""

        def scale(by: float) -> float:
            return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

        return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Phi-3): a divisor for each frequency, one set up to the original context and another beyond it."""

    original_max_positions: int
    attention_factor: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    KIND = "longrope"

    def __post_init__(self) -> None:
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list in JSON
        super().__post_init__()

    def frequencies(self, plain: Frequencies, theta: float, length: int) -> Frequencies:
        del theta
        factors = self.long_factors if length > self.original_max_positions else self.short_factors
        if len(factors) != len(plain):
            raise GeometryError(
                f"The model's rope_scaling has {len(factors)} factors for {len(plain)} frequencies; there must be one "
                "for each."
            )
        return plain / np.array(factors, np.float64)

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    @staticmethod
    def default_attention_factor(factor: float, original_max_positions: int) -> float:
        """The attention factor of a config that gives none."""
        return math.sqrt(1 + math.log(factor) / math.log(original_max_positions)) if factor > 1 else 1.0


KINDS: Mapping[str, type[RopeScaling]] = {
    kind.KIND: kind for kind in (Llama3Scaling, LinearScaling, DynamicScaling, YarnScaling, LongRopeScaling)
}


def scaling_from_dict(record: object) -> RopeScaling | None:
    """The inverse of `RopeScaling.to_dict`, and None of None; without a kind it is Llama 3's.

    Raises:
        GeometryError: a field is missing, unknown, of a wrong type or out of range.
    """
    if record is None:
        return None
    fields = dict(record) if isinstance(record, Mapping) else {}
    kind = KINDS.get(str(fields.pop("kind", Llama3Scaling.KIND)))
    if not fields or kind is None:
        raise GeometryError(f"The model's rope_scaling is {quote(record)}; convert the model again.")
    try:
        return kind(**fields)
    except TypeError as error:
        raise GeometryError(
            f"The checkpoint's rope_scaling cannot be read ({short(str(error))}); convert it again."
        ) from error


def _blended(plain: Frequencies, share: Frequencies, factor: float) -> Frequencies:
    """A share of each frequency as it is, the rest divided by the factor."""
    return plain * (share + (1.0 - share) / factor)
