"""What config.json says about RoPE, in the several places where transformers has kept it.

transformers 5 writes one record, ``rope_parameters``; earlier versions wrote ``rope_theta`` and ``rope_scaling``, and
model cards tell users to add the latter to any config. transformers (`convert_rope_params_to_dict`, version 5.23) takes
``rope_scaling`` instead of ``rope_parameters`` where both are there, and ``rope_theta`` only where the record has none.
That is followed, unless something would be lost by it without a word: then the config is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short, shown
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
    """RoPE as the config.json at `path` describes it; `max_positions` is its max_position_embeddings.

    Raises:
        SourceError: a value is missing or unusable, values contradict each other, or the kind is not supported.
    """
    scaling, parameters = _record(path, config, "rope_scaling"), _record(path, config, "rope_parameters")
    record = scaling or parameters
    theta = number(path, record if "rope_theta" in record else config, "rope_theta", DEFAULT_THETA)
    if scaling and parameters:
        _check_that_nothing_is_lost(path, parameters, scaling | {"rope_theta": theta})
    for place in (config, record):
        if number(path, place, "partial_rotary_factor", 1.0) != 1.0:
            raise SourceError(
                f"{path} rotates only a part of each head (partial_rotary_factor), which is not supported."
            )
    return Rope(theta, _scaling(path, config, record, max_positions))


def _record(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One of the two records, without its nulls."""
    record = {name: value for name, value in mapping(path, config, key).items() if value is not None}
    for name, value in record.items():
        if isinstance(value, dict):
            raise SourceError(f"{path} has a RoPE of its own for {short(name)} ({key}), which is not supported.")
    _check_kind(path, record)
    return record


def _kind(record: Mapping[str, Any]) -> Any:
    return record.get("rope_type", record.get("type", "default"))


def _check_kind(path: Path, record: Mapping[str, Any]) -> None:
    """The two keys for the kind agree, and a factor is not left without one: transformers would not scale then."""
    kinds = [record[key] for key in _KINDS if key in record]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise SourceError(
            f"{path} has a RoPE of rope_type {shown(kinds[0])} and of type {shown(kinds[1])}; keep one of the two."
        )
    if not kinds and record.get("factor", 1) != 1:
        raise SourceError(
            f"{path} has a RoPE scaling factor {shown(record['factor'])} without rope_type; say which type it is, or "
            "remove the factor."
        )


def _check_that_nothing_is_lost(path: Path, parameters: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """What ``rope_parameters`` says is part of what is `used` instead of it."""
    plain = _kind(parameters) == "default"  # then only its theta means something
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
            f"{path} uses RoPE scaling of type {shown(kind)}; supported are 'default', 'llama3', and 'linear' by 1."
        )
    given = {integer(path, place, _ORIGINAL) for place in (record, config) if place.get(_ORIGINAL) is not None}
    if len(given) > 1:
        raise SourceError(f"{path} has one {_ORIGINAL} in its RoPE scaling and another beside it; keep one of the two.")
    return RopeScaling(
        factor=number(path, record, "factor"),
        low_freq_factor=number(path, record, "low_freq_factor"),
        high_freq_factor=number(path, record, "high_freq_factor"),
        original_max_positions=given.pop() if given else max_positions,
    )
