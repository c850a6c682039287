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
from numba_atomflow.geometry import RopeScaling
from numba_atomflow.sources.json_file import integer, mapping, number

DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_KINDS = ("rope_type", "type")


class Rope(NamedTuple):
    """See `ModelGeometry`."""

    theta: float
    scaling: RopeScaling | None


def config_rope(path: Path, config: Mapping[str, Any], max_positions: int) -> Rope:
    """RoPE of the config.json at `path`; `max_positions` is its max_position_embeddings.

    Raises:
        SourceError: a value is missing or invalid, values conflict, or the type is not supported.
    """
    scaling, parameters = _record(path, config, "rope_scaling"), _record(path, config, "rope_parameters")
    record = scaling or parameters
    theta = number(path, record if "rope_theta" in record else config, "rope_theta", DEFAULT_THETA)
    if scaling and parameters:
        _check_conflicts(path, parameters, scaling | {"rope_theta": theta})
    for source in (config, record):
        if number(path, source, "partial_rotary_factor", 1.0) != 1.0:
            raise SourceError(
                f"{path} rotates only a part of each head (partial_rotary_factor), which is not supported."
            )
    return Rope(theta, _scaling(path, config, record, max_positions))


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


def _scaling(
    path: Path, config: Mapping[str, Any], record: Mapping[str, Any], max_positions: int
) -> RopeScaling | None:
    kind = _kind(record)
    if kind == "default":
        return None
    if kind == "linear" and number(path, record, "factor") == 1.0:
        return None
    if kind != "llama3":
        raise SourceError(
            f"{path} uses RoPE scaling of type {quote(kind)}; supported are 'default', 'llama3', and 'linear' by 1."
        )
    original = {integer(path, source, _ORIGINAL) for source in (record, config) if source.get(_ORIGINAL) is not None}
    if len(original) > 1:
        raise SourceError(f"{path} has one {_ORIGINAL} in its RoPE scaling and another beside it; keep one of the two.")
    return RopeScaling(
        factor=number(path, record, "factor"),
        low_freq_factor=number(path, record, "low_freq_factor"),
        high_freq_factor=number(path, record, "high_freq_factor"),
        original_max_positions=original.pop() if original else max_positions,
    )
