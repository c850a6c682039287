"""What a command's parameters are called on a command line, and how their values are read."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer


def names_as_typed(command: Callable[..., None]) -> dict[str, str]:
    """The names of a command's parameters in messages by their names in Python: ``--top-p`` for ``top_p``, the
    placeholder in the help for an argument.
    """
    names = {}
    for name, _, info in _parameters(command):
        declared = [text for text in info.param_decls or () if text.startswith("--")]
        is_argument = type(info).__name__ == "ArgumentInfo"
        names[name] = (
            info.metavar or name if is_argument else declared[0] if declared else f"--{name.replace('_', '-')}"
        )
    return names


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """The message; if it begins with a parameter's name in Python, with that of `names_as_typed` in its place."""
    name, space, rest = message.partition(" ")
    return f"{names.get(name, name)}{space}{rest}"


def refuse_empty_paths(command: Callable[..., None]) -> None:
    """Have a path be refused that is empty, as ``--file "$UNSET"``: pathlib takes it for the current folder."""
    for _, kind, info in _parameters(command):
        if Path in (kind, *get_args(kind)):
            info.parser = _path


def _path(value: str | Path) -> Path:
    if value == "":
        raise typer.BadParameter("it is empty; give a path")
    return Path(value)


def _parameters(command: Callable[..., None]) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and description for typer of each parameter."""
    for name, parameter in inspect.signature(command).parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            kind, info = get_args(parameter.annotation)
            yield name, kind, info
