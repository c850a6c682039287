"""A model's chat template: Jinja source that came with the weights, and is not trusted.

Templates are written for `transformers`, so the environment offers what it offers there: trimmed blocks, loop
controls, ``generation`` blocks, ``raise_exception``, ``strftime_now`` and a ``tojson`` that escapes nothing. Jinja's
sandbox keeps a template away from Python's internals; it sees plain strings, copied from the messages, nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from numba_atomflow.errors import TextError

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: what the template may write by name, such as ``bos_token``.

    Raises:
        TextError: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TextError(f"The model's chat template is not valid Jinja ({_one_line(error)}).") from error

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": ..., "content": ...}`` each; roles are those of `ROLES`.
            add_generation_prompt: end with the opening of the assistant's reply.

        Raises:
            TextError: a message is malformed, or the template refuses the conversation or fails on it.
        """
        plain = [_plain_message(number, message) for number, message in enumerate(messages, start=1)]
        if not plain:
            raise TextError("The chat has no messages; give at least one with role 'user'.")
        try:
            return self._template.render(
                messages=plain,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _Refusal as error:
            raise TextError(f"The model's chat template refuses this conversation: {_one_line(error)}") from error
        except Exception as error:  # foreign code: it may divide by zero, recurse without end, or fill the memory
            raise TextError(f"The model's chat template cannot be rendered ({_one_line(error)}).") from error


class _Refusal(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; here it only lets its body through."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PublicNamespace(Namespace):
    """``namespace()`` whose attributes cannot pass for Python's own (``__call__``, ``__html__`` and their kind)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is taken from args, as Jinja does, so that a template may name an attribute `self`.
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not be called {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    # Jinja's other globals are left out: no chat template needs them, and each is one more object to climb from.
    environment.globals = {
        "range": environment.globals["range"],  # limited in length by the sandbox
        "dict": _make_dict,  # the class itself would lend its methods
        "namespace": _PublicNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the user's own clock, as everywhere


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain_message(number: int, message: Mapping[str, str]) -> dict[str, str]:
    """A copy made of plain strings: subclasses of str could carry methods that the sandbox does not know.

    Raises:
        TextError: the role or the content is missing, unknown or not text.
    """
    if not isinstance(message, Mapping):
        raise TextError(f"Message {number} of the chat is not a mapping with 'role' and 'content'.")
    for key in ("role", "content"):
        if message.get(key) is None:
            raise TextError(f"Message {number} of the chat has no {key!r}; each message needs 'role' and 'content'.")
    for key, value in message.items():
        if not isinstance(value, str):
            raise TextError(f"The {key!r} of message {number} of the chat is {type(value).__name__}; it must be text.")
    if message["role"] not in ROLES:
        raise TextError(
            f"Message {number} of the chat has the unknown role {message['role']!r}; roles are {', '.join(ROLES)}."
        )
    return {str.__str__(key): str.__str__(value) for key, value in message.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
