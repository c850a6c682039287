"""Errors that a client gets, in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from numba_atomflow.errors import AtomFlowError, ContextError, OptionError, TextError
from numba_atomflow.files.untrusted import quote

_LONGEST = 500  # characters of a message, parts of which come from the request


class ApiError(Exception):
    """A refused or failed request.

    Attributes:
        status: HTTP status. message: a sentence. param: the field at fault. code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the response, or of an event in a stream."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def unsupported(param: str, what: str) -> ApiError:
    """A field of OpenAI's API that this server does not have."""
    return ApiError(400, f"{param} {what}.", param=param, code="unsupported_parameter")


def of_engine(error: AtomFlowError) -> ApiError:
    """What a client is told when the engine, the tokenizer or the template raises `error`."""
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, OptionError | TextError):
        return ApiError(400, str(error))
    return ApiError(500, str(error))  # the model's file was changed, for example


def of_validation(error: ValidationError, data: bytes) -> ApiError:
    """One sentence about the first thing that pydantic found in a body."""
    found = error.errors(include_url=False)
    first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    # Of a union there is an error for each branch, which names the branch as well: ("stop", "list[str]", 0).
    same = [item for item in found if item["loc"][:1] == first["loc"][:1]]
    first = max(same, key=lambda item: len(item["loc"]))
    param = _path(first, data)
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
        case "extra_forbidden":
            name = quote(str(first["loc"][-1]))
            return ApiError(400, f"Unrecognized request argument supplied: {name}.", param=param, code="unknown_field")
        case "missing":
            return ApiError(400, f"The field {param} is missing.", param=param, code="missing_field")
        case "union_tag_invalid":
            known, given = first["ctx"]["expected_tags"], quote(first["ctx"]["tag"])
            return ApiError(400, f"{param}.type is {given}; it must be one of {known}.", param=param)
        case "union_tag_not_found":
            return ApiError(400, f"The field {param}.type is missing.", param=param, code="missing_field")
        case "value_error":
            return ApiError(400, f"{first['ctx']['error']}", param=param)
        case "model_type" | "model_attributes_type":
            return ApiError(400, f"{param or 'The body'} must be a JSON object.", param=param)
    _, should, rule = first["msg"].partition(" should ")
    must = f"it must {rule}" if should else first["msg"]
    return ApiError(400, f"{param} is {_as_json(first['input'])}; {must}.", param=param)


def _as_json(value: Any) -> str:
    """A value of a body, for a message; Python writes some of JSON's in another way."""
    return json.dumps(value) if value is None or isinstance(value, bool) else quote(value)


def _path(found: ErrorDetails, data: bytes) -> str | None:
    """The names and indices that lead through a body to what was found, without pydantic's names of union branches."""
    *parents, last = found["loc"] or ("",)
    here: Any = from_json(data) if parents else None
    path = []
    for part in parents:
        if _holds(here, part):
            here = here[part]
            path.append(part)
    if found["type"] in ("missing", "extra_forbidden") or not parents or _holds(here, last):
        path.append(last)
    return ".".join(map(str, path)) or None


def _holds(here: Any, part: str | int) -> bool:
    if isinstance(here, dict):
        return part in here
    return isinstance(here, list) and isinstance(part, int) and part < len(here)
