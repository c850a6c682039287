"""Typed access to the metadata of a GGUF file; a value of a wrong type is rejected by name."""

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote

_T = TypeVar("_T")


class GgufFields:
    """Metadata of one file.

    Args:
        values: key to plain Python value.
        label: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], label: object) -> None:
        self.values = values
        self.label = label

    def __contains__(self, key: str) -> bool:
        return key in self.values

    @overload
    def value(self, key: str, kind: type[_T]) -> _T | None: ...

    @overload
    def value(self, key: str, kind: type[_T], default: _T) -> _T: ...

    def value(self, key: str, kind: type[_T], default: _T | None = None) -> _T | None:
        """The value, which must be of exactly this type (a bool is not an int); `default` if absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            raise self.unusable(key)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; without a default, the key is required."""
        value = self.value(key, int)
        if value is not None:
            return value
        if default is None:
            raise self.missing(key)
        return default

    def integer_of_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """An integer, or a list with the same integer for each layer."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return self.integer(key, default)
        if len(value) < layers or not all(type(item) is int for item in value):
            raise self.unusable(key)
        if value[:layers] != value[:1] * layers:
            raise SourceError(
                f"{self.label} has {key} {quote(value)}: layers of different sizes are not supported; "
                "take a model whose layers are alike."
            )
        return int(value[0])

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float32, as its shortest decimal: 1e-5, not 9.999999747378752e-06."""
        value = self.value(key, float, default)
        if value is None:
            raise self.missing(key)
        if not 0 < value <= float(np.finfo(np.float32).max):
            raise self.unusable(key)
        return float(str(np.float32(value)))

    def items(self, key: str, kind: type[_T]) -> list[_T] | None:
        """A list whose items are of exactly this type; None if absent."""
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            raise self.unusable(key)
        for value in values:
            if type(value) is not kind:
                raise self._unusable_value(key, value)
        return values

    def required_items(self, key: str, kind: type[_T]) -> list[_T]:
        """A required list whose items are of exactly this type."""
        values = self.items(key, kind)
        if values is None:
            raise self.missing(key)
        return values

    def missing(self, key: str) -> SourceError:
        """The error for a missing required key."""
        return SourceError(f"{self.label} lacks the metadata field {key}; get the complete model.")

    def unusable(self, key: str) -> SourceError:
        """The error for a value of a wrong type or range."""
        return self._unusable_value(key, self.values[key])

    def _unusable_value(self, key: str, value: object) -> SourceError:
        return SourceError(
            f"{self.label} has an unusable value in the metadata field {key}: {quote(value)}; get the file again."
        )
