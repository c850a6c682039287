"""The conversation loop of ``numba-atomflow chat``.

A terminal has a prompt, line editing and a history that is kept between sessions; of a pipe, each line is a turn. Every
turn submits the whole conversation; prefix caching leaves only the new tokens to compute.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.cli import output
from numba_atomflow.cli.chat_input import ChatInput, Entry, edit_text, line_editing
from numba_atomflow.cli.chat_reply import ReplyWriter
from numba_atomflow.cli.conversation import Conversation, LoadedMessages, Message, text_of
from numba_atomflow.cli.options import STATE_BAR_AFTER
from numba_atomflow.engine import Engine, Generation
from numba_atomflow.errors import AtomFlowError, ContextError, DestinationError, OptionError, TextError
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.state.state_file import is_state_file
from numba_atomflow.text.reasoning import prompt_opening
from numba_atomflow.utils.arguments import file_path

_HELP = '''/save chat.json     write the conversation to a file, in the shape of OpenAI's interface
/save chat.kv --kv  the same with the KV cache, so that /load has nothing to compute
/load chat.json     go on with a conversation of a file of either kind
/undo               forget the last message and its reply
/retry              another reply to the last message
/edit               change the last message in $EDITOR, and send it again
/think              show the reasoning of the last reply; /think on: of every reply, /think off: folded away
/reset              start a new conversation
/quit               leave; so do Ctrl-D, and Ctrl-C twice
//TEXT              say /TEXT, for a message that begins with /
Ctrl-C              stop a reply; what was generated stays in the conversation

A message of several lines: a backslash at the end of a line continues it, and three quotes surround a block:
> """
... def double(x):
...     return 2 * x
... """'''

_LEAVING = "[Ctrl-C again leaves, and so does Ctrl-D]"
_KV_OPTION = "--kv"


class ChatSession:
    """One conversation with a model.

    Args:
        engine: a loaded engine; the session owns its KV cache.
        params: of every reply.
        system: the system message, or None.
        template_variables: variables for the chat template.
        quiet: no report after a reply.
        as_json: each complete reply as one line of JSON, without a report. Not at a terminal.
        raw_output: control characters of a reply are written to the terminal, not escaped.

    Raises:
        TextError: the model cannot chat, or takes no system message.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        *,
        quiet: bool = False,
        as_json: bool = False,
        raw_output: bool = False,
    ) -> None:
        self.engine = engine
        self.params = params
        self.quiet = quiet
        self.as_json = as_json
        self.raw_output = raw_output
        self.template_variables = template_variables
        self.interactive = sys.stdin.isatty()
        self.conversation = Conversation(system)
        self._input = ChatInput(self.interactive)
        self._show_reasoning = False
        self._attempt = 0  # replies to the last message before this one
        self._interrupted = False  # Ctrl-C was the last thing typed
        self._own_files: set[Path] = set()  # that this session may replace
        first = [*self.conversation.messages, {"role": "user", "content": "Hello"}]
        self._reasoning_opening = prompt_opening(self._render(first))  # fails now, not at the first turn

    def _render(self, messages: Sequence[Message]) -> str:
        return self.engine.text.render_chat(messages, template_variables=self.template_variables)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Read entries and answer them until the end of input, or /quit.

        Raises:
            AtomFlowError: a turn of a piped conversation failed; at a terminal, the session goes on.
        """
        if self.interactive and not self.quiet:
            model, backend = self.engine.checkpoint.path.stem, self.engine.backend
            output.say(f"{model} on {backend.name} ({backend.device}), context of {self.engine.max_seq_len} tokens")
            output.say("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        with line_editing(self.interactive):
            try:
                while self._turn():
                    pass
            except KeyboardInterrupt:  # the second one, perhaps while `_turn` deals with the first
                if not self.interactive:
                    raise
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would only disturb the end of the program
                output.say("")

    def _turn(self) -> bool:
        """Read and answer one entry; False if the session ends."""
        try:
            entry = self._input.read()
            if entry is None or entry == Entry("/quit", is_literal=False):
                return False
            self._interrupted = False
            self._answer(entry)
        except AtomFlowError as error:
            if not self.interactive:
                raise
            output.say(f"error: {error}")
        except KeyboardInterrupt:  # at the prompt, or meant for a reply that has just ended
            if self._interrupted or not self.interactive:
                raise
            self._interrupted = True
            output.say(f"\n{_LEAVING}")
        return True

    def _answer(self, entry: Entry) -> None:
        """Run a command, or reply to a message; an empty one is ignored.

        At a terminal an unknown command is an error; in a pipe it is a message, such as a path or a comment.
        """
        text = entry.text
        if not text:
            return
        if entry.is_literal or not text.startswith("/"):
            self._say(text)
        elif self.interactive and text.startswith("//"):
            self._say(text[1:])
        elif not self._command(text):
            if self.interactive:
                output.say(f"There is no command {text}; /help lists them, //TEXT says /TEXT.")
            else:
                self._say(text)

    def _say(self, text: str) -> None:
        self._attempt = 0
        self._reply([*self.conversation.messages, {"role": "user", "content": text}])

    # --- replies -----------------------------------------------------------------------------------------------------

    def _reply(self, messages: list[Message]) -> None:
        """Answer a conversation, which then is this session's, and write the reply to standard output.

        At a terminal, Ctrl-C ends the reply early. If there is none, the conversation stays as it was.

        Raises:
            ContextError: the conversation has become too long.
        """
        generation: Generation | None = None
        writer = ReplyWriter(self.raw_output, bool(self._reasoning_opening), self._show_reasoning)
        try:
            generation = self.engine.chat(messages, self._params(), template_variables=self.template_variables)
            for piece in generation:
                if not self.as_json:
                    writer.push(piece, generation.stats.tokens)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._interrupted = True
            if generation is not None:
                generation.close()
        except ContextError as error:
            raise ContextError(
                f"The conversation no longer fits the context of {self.engine.max_seq_len} tokens; "
                "start a new one with /reset, shorten the message, or come back with a larger --max-seq-len."
            ) from error
        except AtomFlowError:
            if generation is not None and generation.text and not self.as_json:
                writer.end()  # so that the error begins a line
            raise
        if generation is None or (not generation.text and generation.finish_reason == "interrupted"):
            output.say("\n[stopped before the first token; the conversation is as before]")
            return
        reply = {"role": "assistant", "content": self._reasoning_opening + generation.text}
        self.conversation.messages = [*messages, reply]
        if self.as_json:
            output.emit_json(self._record(generation), indent=None)
            return
        writer.end()
        self._report(generation)

    def _params(self) -> SamplingParams:
        """Those of the session; another seed for another attempt."""
        seed = self.params.seed
        if seed is None or not self._attempt:
            return self.params
        return replace(self.params, seed=(seed + self._attempt) % (1 << 64))

    def _record(self, generation: Generation) -> dict[str, Any]:
        return {
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "stats": output.stats_record(self.engine, generation.stats),
        }

    def _report(self, generation: Generation) -> None:
        stats = generation.stats
        match generation.finish_reason:
            case "interrupted":
                output.say("[stopped]")
            case "max_tokens":
                output.say(f"[cut after {stats.tokens} tokens; --max-tokens sets the limit]")
            case "context":
                output.say("[the context is full; /reset starts a new conversation]")
        if not self.quiet:
            speed = f", {stats.tokens_per_second:.1f} tok/s" if stats.tokens > 1 else ""
            if stats.proposed:
                speed += f", {stats.mean_accepted_length:.2f} tokens per step"
            output.say(
                f"[prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them cached; "
                f"reply {stats.tokens} tokens{speed}]"
            )

    # --- commands ----------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Run a command; False if it is none."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        actions = {
            "/help": lambda: output.say(_HELP),
            "/reset": self._reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/edit": self._edit,
            "/think": self._show_last_reasoning,
        }
        match name, rest:
            case "/think", "on" | "off":
                self._show_reasoning = rest == "on"
                output.say(f"[reasoning is {'shown' if self._show_reasoning else 'folded away'}]")
            case "/save", _:
                self._save(rest)
            case "/load", _:
                self._load(rest)
            case _, "" if name in actions:
                actions[name]()
            case _:
                return False
        return True

    def _reset(self) -> None:
        self.conversation.reset()
        self.engine.reset()
        output.say("[new conversation]")

    def _undo(self) -> None:
        before = self.conversation.before_last_user()
        if before is None:
            output.say("[there is no message to forget]")
            return
        self.conversation.messages = before
        output.say(f"[forgotten; the conversation has {len(before)} messages now]")

    def _retry(self) -> None:
        before, last = self.conversation.before_last_user(), self.conversation.last_user()
        if before is None or last is None:
            output.say("[there is no message to reply to]")
            return
        if self.params.greedy:
            output.say("[without --temperature, every reply to a message is the same]")
        self._attempt += 1
        self._reply([*before, last])

    def _edit(self) -> None:
        if not self.interactive:
            raise OptionError("/edit opens an editor, which needs a terminal; use /undo and send another message.")
        last = self.conversation.last_user()
        before = self.conversation.before_last_user() if last is not None else self.conversation.messages
        old = "" if last is None else text_of(last)
        text = edit_text(old).strip()
        if not text or text == old:
            output.say("[nothing was changed, and nothing sent]")
            return
        self._attempt = 0
        self._reply([*(before or ()), {"role": "user", "content": text}])

    def _show_last_reasoning(self) -> None:
        output.say(self.conversation.last_reasoning() or "[the last reply has no reasoning]")

    # --- files -------------------------------------------------------------------------------------------------------

    def _save(self, argument: str) -> None:
        """Write the conversation, with --kv and the KV cache.

        Raises:
            DestinationError: the file exists and is not one of this session, or has a KV cache and --kv is missing, or
            cannot be written.
        """
        name, with_cache = _kv_option(argument)
        path = _path(name)
        if path is None:
            output.say(f"Name the file: /save FILE, or /save FILE {_KV_OPTION}")
            return
        target = Path(os.path.realpath(path))  # `Path.resolve` refuses symlinks that form a loop
        own = target in self._own_files
        path = target if own else path
        if with_cache:
            if not own and os.path.lexists(path):
                raise DestinationError(f"{path} exists; choose another name.")
            with output.bytes_bar(after=STATE_BAR_AFTER) as progress:
                self.engine.save_state(path, self.conversation.messages, overwrite=own, progress=progress)
        elif own and is_state_file(path):
            raise DestinationError(f"{path} holds a KV cache as well; add {_KV_OPTION}, or choose another name.")
        else:
            self.conversation.write(path, self.engine.checkpoint.path, replace=own)
        self._own_files.add(target)
        output.say(f"[saved to {path}]")

    def _load(self, argument: str) -> None:
        """Go on with the conversation of a file; on an error, with the one before.

        Raises:
            TextError: the file is missing, damaged, or no conversation, or the model's chat template refuses it.
            StateError: it holds a KV cache of another model or format, or is damaged.
        """
        path = _path(argument)
        if path is None:
            output.say("Name the file: /load FILE")
            return
        if is_state_file(path):
            with output.bytes_bar(after=STATE_BAR_AFTER) as progress:
                messages = self.engine.load_state(path, progress)
            if not messages:
                raise TextError(f"{path} holds a KV cache without a conversation; make one with /save FILE --kv.")
            is_own = True
        else:
            loaded = LoadedMessages(path)
            messages, is_own = loaded.messages, not loaded.other_keys
        self._render(messages)
        self.conversation.messages = messages
        if is_own:
            self._own_files.add(Path(os.path.realpath(path)))
        reply = "; the last has no reply, /retry asks for one" if messages[-1].get("role") == "user" else ""
        output.say(f"[loaded {len(messages)} messages from {path}{reply}]")


def _kv_option(argument: str) -> tuple[str, bool]:
    """The argument of /save without --kv, and whether it had it, before or after the name."""
    first, _, rest = argument.partition(" ")
    if first == _KV_OPTION:
        return rest.strip(), True
    name, _, last = argument.rpartition(" ")
    return (name.strip(), True) if last == _KV_OPTION else (argument, False)


def _path(text: str) -> Path | None:
    """A file's path as it was typed, in every locale; None for nothing."""
    if not text:
        return None
    return home.expand_user(file_path("FILE", os.fsdecode(text.encode(errors="surrogateescape"))))
