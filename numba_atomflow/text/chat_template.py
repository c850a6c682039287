"""A model's chat template: Jinja source that came with the weights, and is not trusted.

It runs in a process of its own (`template_process`), bounded in time, memory and length of text, and sees plain data,
copied from the messages, nothing else. Importing this module costs nothing: Jinja is loaded in that process alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.files.untrusted import shown, visible
from numba_atomflow.text import template_process

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# What a template calls by name: a variable may not take the place of one. Those of Jinja are reserved as well.
RESERVED = frozenset(
    {
        *("messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"),
        *("range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"),
        *("self", "loop", "caller", "varargs", "kwargs", "context", "environment"),
        *("true", "false", "none", "True", "False", "None"),
    }
)

_DEEPEST = 64  # levels of lists and mappings in a message
_LARGEST = 1 << 64  # of a whole number in a message


class ChatTemplate:
    """A chat template that is known to compile.

    Args:
        source: Jinja text.
        special_tokens: what the template may write by name, such as ``bos_token``.

    Raises:
        TextError: the source is not valid Jinja, or compiling it takes too much time or memory.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._process = template_process.shared()
        self._ask(None)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, as in OpenAI's interface; roles are those of `ROLES`.
                The content is a text or a list of text parts, which are joined; it may be missing or None beside
                ``tool_calls``. Other fields reach the template as plain data.
            add_generation_prompt: end with the opening of the assistant's reply.
            template_variables: more names that the template knows, such as ``{"enable_thinking": False}``, or the
                ``tools`` that the model may call.

        Raises:
            TextError: a message is malformed, or the template refuses the conversation, fails on it, or takes too much
                time, memory or text for it.
            OptionError: a variable has a name that templates use otherwise, or a value that is no plain data.
        """
        plain = _plain_messages(messages)
        if not plain:
            raise TextError("The chat has no messages; give at least one with role 'user'.")
        if "developer" not in self._source:  # OpenAI's newer name for the system's role, which few templates know
            plain = [message | {"role": "system"} if message["role"] == "developer" else message for message in plain]
        return self._ask(
            {"tools": None, "documents": None}
            | plain_variables({} if template_variables is None else template_variables)
            | self._special_tokens
            | {"messages": plain, "add_generation_prompt": bool(add_generation_prompt)}
        )

    def try_out(self) -> None:
        """Render a short conversation: whether the template refuses it, or fails on it, is of no interest here.

        Raises:
            TextError: the template goes beyond its limits.
        """
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except template_process.TemplateExcessError:
            raise
        except TextError:  # it may want another conversation, or a variable
            return

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        match self._process.ask(self._source, variables):
            case {"text": text}:
                return text
            case {"refusal": reason}:
                end = "" if reason.endswith((".", "!", "?")) else "."
                raise TextError(f"The model's chat template refuses this conversation: {visible(reason)}{end}")
            case {"invalid": reason}:
                raise TextError(f"The model's chat template is not valid Jinja ({visible(reason)}).")
            case answer:
                raise TextError(f"The model's chat template cannot be rendered ({visible(answer['failure'])}).")


def plain_variables(variables: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy of variables for a template, in plain data.

    Raises:
        OptionError: a name is reserved or no name at all, or a value is no plain data.
    """
    if not isinstance(variables, Mapping):
        raise OptionError("template_variables must map names to values.")
    plain = {}
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise OptionError(f"The template variable {shown(name)} has no usable name; take letters, digits and _.")
        if name in RESERVED:
            raise OptionError(f"The template variable {shown(name)} is reserved; the template gets it from the model.")
        try:
            plain[str.__str__(name)] = _plain(value)
        except _NotPlainError as error:
            raise OptionError(f"The template variable {shown(name)} {error}.") from error
    return plain


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise TextError("A chat is a list of messages, each a mapping with 'role' and 'content'.")
    return [_plain_message(number, message) for number, message in enumerate(messages, start=1)]


def _plain_message(number: int, message: Message) -> dict[str, Any]:
    """A copy in plain data: objects of other classes could not be handed to the template's process.

    Raises:
        TextError: the role or the content is missing, unknown or of a wrong type, or another field is no plain data.
    """
    if not isinstance(message, Mapping):
        raise TextError(f"Message {number} of the chat is not a mapping with 'role' and 'content'.")
    calls = bool(message.get("tool_calls"))
    for key in ("role", "content"):
        if message.get(key) is None and not (key == "content" and calls):
            raise TextError(f"Message {number} of the chat has no {key!r}; each message needs 'role' and 'content'.")
    plain: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise TextError(f"Message {number} of the chat has a field with the name {shown(key)}, which is no text.")
        try:
            plain[str.__str__(key)] = _text(value) if key == "content" and value is not None else _plain(value)
        except _NotPlainError as error:
            raise TextError(f"The {shown(key)} of message {number} of the chat {error}.") from error
    role = plain["role"]
    if not isinstance(role, str):
        raise TextError(f"The 'role' of message {number} of the chat is {type(role).__name__}; it must be text.")
    if role not in ROLES:
        raise TextError(
            f"Message {number} of the chat has the unknown role {shown(role)}; roles are {', '.join(ROLES)}."
        )
    return plain


class _NotPlainError(Exception):
    """The end of a sentence about a value that no template can be given."""


def _text(content: Any) -> str:
    """A message's content as one text: parts of type "text" are joined with nothing between them."""
    if isinstance(content, str):
        return str.__str__(content)
    if isinstance(content, Mapping) or not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise _NotPlainError(f"is {type(content).__name__}; it must be text, or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else "that is no text part"
            raise _NotPlainError(f'has a part {what}; this program takes {{"type": "text", "text": ...}} alone')
        texts.append(str.__str__(part["text"]))
    return "".join(texts)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of dict, list, str, int, float, bool and None."""
    if depth > _DEEPEST:
        raise _NotPlainError(f"is nested more than {_DEEPEST} levels deep")
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case Integral():
            number = int(value)
            if abs(number) >= _LARGEST:
                raise _NotPlainError("holds a whole number of more than 64 bits")
            return number
        case Real():
            if not math.isfinite(value):
                raise _NotPlainError("holds a number that is not finite")
            return float(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise _NotPlainError(f"holds the name {shown(key)}, which is no text")
            return {str.__str__(key): _plain(item, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, depth + 1) for item in value]
    raise _NotPlainError(f"holds {type(value).__name__}; text, numbers, lists and mappings are plain data")
