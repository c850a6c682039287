"""The messages of a chat, in the shape of OpenAI's interface, and their files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numba_atomflow.errors import DestinationError, TextError
from numba_atomflow.files.atomic import write_whole
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.files.untrusted import load_json
from numba_atomflow.text.reasoning import split_reasoning

Message = dict[str, Any]

_OWN_KEYS = {"model", "messages"}  # of the files that `write` makes


class Conversation:
    """The messages so far.

    Args:
        system: the system message with which a new conversation begins, or None.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` each; those of a file as they are there.
    """

    def __init__(self, system: str | None) -> None:
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Begin anew, with the system message."""
        self.messages = list(self._opening)

    def before_last_user(self) -> list[Message] | None:
        """The messages before the user's last one; None if there is none."""
        for index in reversed(range(len(self.messages))):
            if self.messages[index].get("role") == "user":
                return self.messages[:index]
        return None

    def last_user(self) -> Message | None:
        """The user's last message."""
        before = self.before_last_user()
        return None if before is None else self.messages[len(before)]

    def last_reasoning(self) -> str:
        """The reasoning of the last reply; "" if it has none."""
        for message in reversed(self.messages):
            if message.get("role") == "assistant":
                apart = message.get("reasoning_content")  # as some servers name it
                return apart if isinstance(apart, str) else split_reasoning(text_of(message)).reasoning
        return ""

    def write(self, path: Path, model: Path, *, replace: bool) -> None:
        """Write the conversation as JSON.

        Raises:
            DestinationError: the file exists and `replace` is False, or it cannot be written.
        """
        record = {"model": str(model), "messages": self.messages}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        try:
            write_whole(path, text.encode(errors="replace"), replace=replace)
        except FileExistsError as error:
            raise DestinationError(f"{path} exists; choose another name.") from error
        except OSError as error:
            raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error


class LoadedMessages:
    """A conversation from a JSON file: a list of messages, or an object with the list "messages".

    Attributes:
        messages: as they are in the file; the chat template checks each.
        other_keys: what the file holds besides.

    Raises:
        TextError: the file cannot be read, or is no such JSON.
    """

    def __init__(self, path: Path) -> None:
        text = read_text_file(path)
        try:
            record = load_json(text)
        except ValueError as error:
            raise TextError(f"{path} is not JSON ({error}); give a file of /save, or messages of a chat.") from error
        self.other_keys: set[str] = set()
        if isinstance(record, dict):
            self.other_keys = record.keys() - _OWN_KEYS
            record = record.get("messages")
        if not isinstance(record, list) or not record:
            raise TextError(f'{path} holds no messages; give a list of them, or an object with "messages".')
        self.messages: list[Message] = record


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, parts of type "text" joined."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
