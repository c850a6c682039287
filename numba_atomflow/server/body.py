"""The base of what requests contain: JSON objects, checked by pydantic."""

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from numba_atomflow.server.errors import of_validation


class Body(BaseModel):
    """A JSON object without unknown fields, whose values have their types exactly."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The object that a request's body holds.

        Raises:
            ApiError: the body is not JSON, or a field is unknown, missing, not supported, or of a wrong value.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise of_validation(error, data) from None
