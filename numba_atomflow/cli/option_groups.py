"""Options that belong together, as one parameter of a command.

A group is a frozen dataclass whose fields are annotated as typer options. `with_groups` shows typer a function with the
fields in the group's place, and calls the command with the group.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from typing import Any, get_type_hints


class OptionGroup:
    """Base of all groups."""


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it. Its parameters are keyword-only, those of a group without a default."""
    parameters, groups = [], dict[str, tuple[type[OptionGroup], list[str]]]()
    for name, parameter in inspect.signature(command).parameters.items():
        kind = parameter.annotation
        if not (isinstance(kind, type) and issubclass(kind, OptionGroup)):
            parameters.append(parameter)
            continue
        options = _parameters(kind)
        groups[name] = kind, [option.name for option in options]
        parameters += options

    @wraps(command)
    def run(**values: Any) -> None:
        for name, (kind, names) in groups.items():
            values[name] = kind(**{option: values.pop(option) for option in names})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: type[OptionGroup]) -> list[inspect.Parameter]:
    """The fields of a group as keyword parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)  # type: ignore[arg-type]
    ]
