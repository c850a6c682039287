"""The RoPE settings of config.json, in the formats of all versions of transformers.

transformers 5 writes one record, ``rope_parameters``; earlier versions write ``rope_theta`` and ``rope_scaling``, and
model cards tell users to add the latter to any config. If both records exist, transformers 5.23
(`convert_rope_params_to_dict`) uses ``rope_scaling``, and ``rope_theta`` only if the record has none. The same rule
applies here, but a config in which it would silently drop a setting is rejected.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.rope_scaling import (
    LARGEST_COUNT,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)
from numba_atomflow.sources.huggingface_families import FAMILIES
from numba_atomflow.sources.json_file import flag, integer, mapping, number, unusable

_ORIGINAL = "original_max_position_embeddings"
_KINDS = ("rope_type", "type")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LOCAL_THETA = 10000.0
_MSCALES = ("mscale", "mscale_all_dim")


class Rope(NamedTuple):
    """See `ModelGeometry`."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int
    rotary_dim: int | None = None
    local_theta: float | None = None


def config_rope(path: Path, config: Mapping[str, Any], head_dim: int) -> Rope:
    """RoPE of the config.json at `path`, and the positions that it allows.

    Raises:
        SourceError: a value is missing or invalid, values conflict, or the type is not supported.
    """
    family = FAMILIES[config["model_type"]]
    local_theta = None
    if config["model_type"] == "gemma3_text":
        config, local_theta = _split_by_layers(path, config)
    scaling, parameters = _record(path, config, "rope_scaling"), _record(path, config, "rope_parameters")
    record = scaling or parameters
    theta = number(path, record if "rope_theta" in record else config, "rope_theta", family.theta)
    if scaling and parameters:
        _check_conflicts(path, parameters, scaling | {"rope_theta": theta})
    rotary_dim = _rotary_dim(path, config, record, head_dim)
    settings = _Settings(path, config, record, integer(path, config, "max_position_embeddings", family.max_positions))
    found = settings.scaling((rotary_dim or head_dim) // 2)
    return Rope(theta, found, _positions(path, found, settings.max_positions), rotary_dim, local_theta)


def _split_by_layers(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The config with the RoPE of layers with full attention only, and the base of the others (Gemma 3)."""
    nested = mapping(path, config, "rope_parameters")
    if not any(name in nested for name in _LAYER_TYPES):
        return dict(config), number(path, config, "rope_local_base_freq", _LOCAL_THETA)
    full, local = (mapping(path, nested, name) for name in _LAYER_TYPES)
    if _kind(local) not in (None, "default"):
        raise SourceError(
            f"{path} uses RoPE scaling of type {quote(_kind(local))} in layers with a sliding window, which is not "
            "supported."
        )
    return dict(config) | {"rope_parameters": dict(full)}, number(path, local, "rope_theta", _LOCAL_THETA)


def _rotary_dim(path: Path, config: Mapping[str, Any], record: Mapping[str, Any], head_dim: int) -> int | None:
    """How many elements of a head are rotated; None: all."""
    shares = {number(path, source, "partial_rotary_factor", 1.0) for source in (record, config)} - {1.0}
    if not shares:
        return None
    if not FAMILIES[config["model_type"]].partial_rope:
        raise SourceError(f"{path} rotates only a part of each head (partial_rotary_factor), which is not supported.")
    if len(shares) > 1:
        raise SourceError(f"{path} has two values of partial_rotary_factor; keep one of the two.")
    share = shares.pop()
    if share > 1:
        raise unusable(path, "partial_rotary_factor", share)
    return int(head_dim * share)


def _positions(path: Path, scaling: RopeScaling | None, max_positions: int) -> int:
    """The positions that a model allows: those types say how far they extend them."""
    if not isinstance(scaling, DynamicScaling | YarnScaling):
        return max_positions
    extended = scaling.original_max_positions * scaling.factor
    if extended > LARGEST_COUNT:
        raise unusable(path, "factor", scaling.factor)
    return max(max_positions, int(extended))


def _record(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One of the two records, without null values."""
    record = {name: value for name, value in mapping(path, config, key).items() if value is not None}
    for name, value in record.items():
        if isinstance(value, dict):
            raise SourceError(f"{path} has a RoPE of its own for {short(name)} ({key}), which is not supported.")
    _check_kind(path, record)
    return record


def _kind(record: Mapping[str, Any]) -> Any:
    return record.get("rope_type", record.get("type", "default"))


def _check_kind(path: Path, record: Mapping[str, Any]) -> None:
    """Check that the two keys of the type agree, and that a factor has a type: without one, transformers ignores it."""
    kinds = [record[key] for key in _KINDS if key in record]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise SourceError(
            f"{path} has a RoPE of rope_type {quote(kinds[0])} and of type {quote(kinds[1])}; keep one of the two."
        )
    if not kinds and record.get("factor", 1) != 1:
        raise SourceError(
            f"{path} has a RoPE scaling factor {quote(record['factor'])} without rope_type; say which type it is, or "
            "remove the factor."
        )


def _check_conflicts(path: Path, parameters: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Check that every setting of ``rope_parameters`` is in the record `used` in its place."""
    plain = _kind(parameters) == "default"  # then only rope_theta applies
    lost = [
        key
        for key, value in parameters.items()
        if key not in _KINDS and (key == "rope_theta" or not plain) and used.get(key) != value
    ]
    if not plain and _kind(parameters) != _kind(used):
        lost.append("rope_type")
    if lost:
        raise SourceError(
            f"{path} has another {short(lost[0])} in rope_parameters than in rope_scaling or beside it; keep one of "
            "the two."
        )


class _Settings(NamedTuple):
    """The settings of a scaling: `record` has them, and `config` some more beside it."""

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    max_positions: int

    def scaling(self, pairs: int) -> RopeScaling | None:
        """The scaling of frequencies of so many pairs."""
        kind = _kind(self.record)
        if self.config["model_type"] == "phi3" and kind in ("su", "yarn"):  # names in early versions of Phi-3
            kind = "longrope"
        match kind:
            case "default":
                return None
            case "llama3":
                return Llama3Scaling(
                    factor=self._number("factor"),
                    low_freq_factor=self._number("low_freq_factor"),
                    high_freq_factor=self._number("high_freq_factor"),
                    original_max_positions=self._original(),
                )
            case "linear":
                factor = self._number("factor")
                return None if factor == 1.0 else LinearScaling(factor)
            case "dynamic":
                return DynamicScaling(self._number("factor"), self.max_positions)
            case "yarn":
                return self._yarn()
            case "longrope":
                return self._longrope(pairs)
        raise SourceError(
            f"{self.path} uses RoPE scaling of type {quote(kind)}; supported are 'default', 'linear', 'dynamic', "
            "'yarn', 'longrope' and 'llama3'."
        )

    def _yarn(self) -> YarnScaling:
        original = self._original()
        factor = self._number("factor", self.max_positions / original)
        scales = (number(self.path, self.record, key, 0.0) if key in self.record else 0.0 for key in _MSCALES)
        return YarnScaling(
            factor,
            original,
            self._number("attention_factor", YarnScaling.default_attention_factor(factor, *scales)),
            beta_fast=self._number("beta_fast", 32.0),
            beta_slow=self._number("beta_slow", 1.0),
            truncate=flag(self.path, self.record, "truncate", True),
        )

    def _longrope(self, pairs: int) -> LongRopeScaling:
        original = self._original()
        factor = self._number("factor", self.max_positions / original)
        return LongRopeScaling(
            factor,
            original,
            self._number("attention_factor", LongRopeScaling.default_attention_factor(factor, original)),
            self._factors("short_factor", pairs),
            self._factors("long_factor", pairs),
        )

    def _factors(self, key: str, pairs: int) -> tuple[float, ...]:
        values = self.record.get(key)
        if not isinstance(values, list):
            raise unusable(self.path, key, values)
        if len(values) != pairs:
            raise SourceError(f"{self.path} has {len(values)} values of {key} for {pairs} rotated pairs; get it again.")
        return tuple(number(self.path, {key: value}, key) for value in values)

    def _number(self, key: str, default: float | None = None) -> float:
        return number(self.path, self.record, key, default)

    def _original(self) -> int:
        found = {
            integer(self.path, source, _ORIGINAL)
            for source in (self.record, self.config)
            if source.get(_ORIGINAL) is not None
        }
        if len(found) > 1:
            raise SourceError(
                f"{self.path} has one {_ORIGINAL} in its RoPE scaling and another beside it; keep one of the two."
            )
        default = FAMILIES[self.config["model_type"]].original_positions or self.max_positions
        original = found.pop() if found else default
        if original < 2:  # some formulas divide by its logarithm
            raise unusable(self.path, _ORIGINAL, original)
        return original
