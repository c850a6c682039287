"""The messages of a chat: what is forgotten, what is shown, and which files hold messages."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, write_json

from numba_atomflow.cli.conversation import Conversation, LoadedMessages, text_of
from numba_atomflow.errors import DestinationError, TextError
from numba_atomflow.text.chat_template import ChatTemplate

SYSTEM, USER = {"role": "system", "content": "short"}, {"role": "user", "content": "hi"}
REPLY, TOOL = {"role": "assistant", "content": "<think>Hm.</think>Yes"}, {"role": "tool", "content": "sunny"}


def test_a_turn_ends_with_everything_that_followed_the_message() -> None:
    conversation = Conversation("short")
    assert conversation.messages == [SYSTEM]
    assert conversation.before_last_user() is None
    assert conversation.last_user() is None
    conversation.messages = [SYSTEM, USER, REPLY, {"role": "user", "content": "again"}, REPLY, TOOL, REPLY]
    assert conversation.before_last_user() == [SYSTEM, USER, REPLY]
    assert conversation.last_user() == {"role": "user", "content": "again"}
    conversation.reset()
    assert conversation.messages == [SYSTEM]


def test_the_reasoning_of_the_last_reply() -> None:
    conversation = Conversation(None)
    assert conversation.last_reasoning() == ""
    conversation.messages = [USER, REPLY, USER]
    assert conversation.last_reasoning() == "Hm."
    conversation.messages.append({"role": "assistant", "content": "Yes"})
    assert conversation.last_reasoning() == ""
    conversation.messages[-1]["reasoning_content"] = "Apart."
    assert conversation.last_reasoning() == "Apart."


@pytest.mark.parametrize(
    ("content", "text"),
    [("a", "a"), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {}, 5], "ab"), (None, ""), (5, "")],
)
def test_the_text_of_a_message(content: Any, text: str) -> None:
    assert text_of({"role": "user", "content": content}) == text


def test_what_is_written_is_read(tmp_path: Path) -> None:
    conversation = Conversation("Grüße 🙂")
    conversation.write(tmp_path / "chat.json", Path("model"), replace=False)
    loaded = LoadedMessages(tmp_path / "chat.json")
    assert (loaded.messages, loaded.other_keys) == (conversation.messages, set())
    with pytest.raises(DestinationError, match="exists"):
        conversation.write(tmp_path / "chat.json", Path("model"), replace=False)
    write_json(tmp_path / "request.json", {"messages": [USER], "temperature": 1})
    assert LoadedMessages(tmp_path / "request.json").other_keys == {"temperature"}


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds no messages"),
        ('{"a": 1}', "holds no messages"),
        ('{"messages": {}}', "holds no messages"),
        ('[{"role": "user"}]', "has no 'content'"),
        ("[1]", "is not a mapping"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "part of type 'image_url'"),
    ],
)
def test_a_file_that_holds_no_messages(tmp_path: Path, contents: str, sentence: str) -> None:
    (tmp_path / "chat.json").write_text(contents)
    with pytest.raises(TextError, match=sentence):
        ChatTemplate(CHAT_TEMPLATE, {}).render(LoadedMessages(tmp_path / "chat.json").messages)
