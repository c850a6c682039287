"""Chat templates: untrusted Jinja source that comes with the weights.

A template is rendered in a separate process (`template_process`) with limits on CPU time, memory and output length. It
receives plain data copied from the messages. Jinja is imported only in that process, so importing this module is cheap.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.files.untrusted import escape_controls, load_json, quote
from numba_atomflow.text import template_process

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Names that templates use, and names reserved by Jinja: a template variable must not replace them.
RESERVED = frozenset(
    {
        *("messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"),
        *("range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"),
        *("self", "loop", "caller", "varargs", "kwargs", "context", "environment"),
        *("true", "false", "none", "True", "False", "None"),
    }
)

_MAX_DEPTH = 64  # nested lists and mappings in a message
_MAX_INTEGER = 1 << 64  # in a message


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: by the name that the template uses, such as ``bos_token``.

    Raises:
        TextError: the source is not valid Jinja, or compiling it exceeds the limits of time or memory.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._process = template_process.shared_process()
        self._request(None)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        replace: Callable[[Any], Any] | None = None,
    ) -> str:
        """Format a conversation as the model was trained on it.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, as in OpenAI's interface; roles are those of `ROLES`.
                The content is a text or a list of text parts, which are joined; it may be missing or None beside
                ``tool_calls``, and is "" then for a template that cannot take None. Other fields reach the template as
                plain data.
            add_generation_prompt: end with the opening of the assistant's reply.
            template_variables: further template variables, such as ``{"enable_thinking": False}``, or the ``tools``
                that the model may call.
            replace: applied to the messages and the variables once they are plain data, as one value.

        Raises:
            TextError: a message is malformed, or the template raises an error or exceeds its limits of time, memory or
                output length.
            OptionError: the name of a variable is reserved, or its value is not plain data.
        """
        plain = _plain_messages(messages)
        if not plain:
            raise TextError("The chat has no messages; give at least one with role 'user'.")
        if "developer" not in self._source:  # OpenAI's newer name of the system role, which few templates support
            plain = [message | {"role": "system"} if message["role"] == "developer" else message for message in plain]
        variables = plain_variables({} if template_variables is None else template_variables)
        if replace is not None:
            plain, variables = replace([plain, variables])
        variables = {"tools": None, "documents": None} | variables | self._special_tokens
        variables["add_generation_prompt"] = bool(add_generation_prompt)
        texts = [message | {"content": ""} if message.get("content") is None else message for message in plain]
        try:
            return self._request(variables | {"messages": plain})
        except template_process.TemplateExcessError:
            raise
        except TextError:
            if texts == plain:
                raise
        return self._request(variables | {"messages": texts})  # a template that joins texts fails at None

    def try_question(self) -> str | None:
        """Render a conversation of one question.

        Returns:
            The template's error, or None; it may need another conversation, or a variable.

        Raises:
            TextError: the template exceeds its limits.
        """
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except template_process.TemplateExcessError:
            raise
        except TextError as error:
            return str(error)
        return None

    def _request(self, variables: Mapping[str, Any] | None) -> str:
        match self._process.request(self._source, variables):
            case {"text": text}:
                return text
            case {"refusal": reason}:
                end = "" if reason.endswith((".", "!", "?")) else "."
                raise TextError(f"The model's chat template refuses this conversation: {escape_controls(reason)}{end}")
            case {"invalid": reason}:
                raise TextError(f"The model's chat template is not valid Jinja ({escape_controls(reason)}).")
            case answer:
                raise TextError(f"The model's chat template cannot be rendered ({escape_controls(answer['failure'])}).")


def plain_variables(variables: Mapping[Any, Any]) -> dict[str, Any]:
    """Copy template variables as plain data.

    Raises:
        OptionError: a name is reserved or not an identifier, or a value is not plain data.
    """
    if not isinstance(variables, Mapping):
        raise OptionError("template_variables must map names to values.")
    plain = {}
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise OptionError(f"The template variable {quote(name)} has no usable name; take letters, digits and _.")
        if name in RESERVED:
            raise OptionError(f"The template variable {quote(name)} is reserved; the template gets it from the model.")
        try:
            plain[str.__str__(name)] = _plain(value)
        except _NotPlainError as error:
            raise OptionError(f"The template variable {quote(name)} {error}.") from error
    return plain


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    no_list = TextError("A chat is a list of messages, each a mapping with 'role' and 'content'.")
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise no_list
    try:
        messages = list(messages)
    except TypeError:  # an array without dimensions
        raise no_list from None
    return [_plain_message(number, message) for number, message in enumerate(messages, start=1)]


def _plain_message(number: int, message: Message) -> dict[str, Any]:
    """Copy a message as plain data, which can be sent to the template process.

    Raises:
        TextError: the role or the content is missing, unknown or of a wrong type, or another field is not plain data.
    """
    if not isinstance(message, Mapping):
        raise TextError(f"Message {number} of the chat is not a mapping with 'role' and 'content'.")
    calls = message.get("tool_calls")
    has_tool_calls = isinstance(calls, Sequence) and len(calls) > 0
    for key in ("role", "content"):
        if message.get(key) is None and not (key == "content" and has_tool_calls):
            raise TextError(f"Message {number} of the chat has no {key!r}; each message needs 'role' and 'content'.")
    plain: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise TextError(f"Message {number} of the chat has a field with the name {quote(key)}, which is no text.")
        try:
            plain[str.__str__(key)] = _text(value) if key == "content" and value is not None else _plain(value)
        except _NotPlainError as error:
            raise TextError(f"The {quote(key)} of message {number} of the chat {error}.") from error
    _parse_arguments(plain)
    role = plain["role"]
    if not isinstance(role, str):
        raise TextError(f"The 'role' of message {number} of the chat is {type(role).__name__}; it must be text.")
    if role not in ROLES:
        raise TextError(
            f"Message {number} of the chat has the unknown role {quote(role)}; roles are {', '.join(ROLES)}."
        )
    return plain


def _parse_arguments(message: dict[str, Any]) -> None:
    """Replace the arguments of tool calls, which are JSON text in OpenAI's interface, by the object that templates
    expect, as transformers does. Other text stays.
    """
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError, _NotPlainError):
                arguments = _plain(load_json(function["arguments"]))
                if isinstance(arguments, dict):
                    function["arguments"] = arguments


class _NotPlainError(Exception):
    """A value that cannot be sent to a template; the message is the predicate of a sentence about it."""


def _text(content: Any) -> str:
    """The content of a message as one string; parts of type "text" are concatenated."""
    if isinstance(content, str):
        return str.__str__(content)
    if isinstance(content, Mapping) or not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise _NotPlainError(f"is {type(content).__name__}; it must be text, or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {quote(kind)}" if isinstance(kind, str) and kind != "text" else "that is no text part"
            raise _NotPlainError(f'has a part {what}; only {{"type": "text", "text": ...}} is supported')
        texts.append(str.__str__(part["text"]))
    return "".join(texts)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy that consists of dict, list, str, int, float, bool and None."""
    if depth > _MAX_DEPTH:
        raise _NotPlainError(f"is nested more than {_MAX_DEPTH} levels deep")
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case Integral():
            number = int(value)
            if abs(number) >= _MAX_INTEGER:
                raise _NotPlainError("holds an integer of more than 64 bits")
            return number
        case Real():
            if not math.isfinite(value):
                raise _NotPlainError("holds a number that is not finite")
            return float(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise _NotPlainError(f"holds the name {quote(key)}, which is no text")
            return {str.__str__(key): _plain(item, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, depth + 1) for item in value]
    raise _NotPlainError(f"holds {type(value).__name__}; text, numbers, lists and mappings are plain data")
