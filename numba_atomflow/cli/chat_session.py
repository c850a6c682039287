"""The conversation loop of ``numba-atomflow chat``.

A terminal has a prompt, line editing and a history that is kept between sessions; of a pipe, each line is a turn. Every
turn submits the whole conversation; prefix caching leaves only the new tokens to compute.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.cli import output
from numba_atomflow.engine import Engine, Generation
from numba_atomflow.errors import AtomFlowError, ContextError, DestinationError, TextError
from numba_atomflow.files.atomic import write_whole
from numba_atomflow.files.text_input import as_unicode, read_line
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.utils.arguments import file_path

PROMPT = "> "
HISTORY_LINES = 1000

_HELP = """/reset      start a new conversation
/save FILE  write the conversation to FILE as JSON
/quit       leave; so does Ctrl-D, and Ctrl-C at the prompt
//TEXT      say /TEXT, for a message that begins with /
Ctrl-C      stop a reply; what was generated stays in the conversation"""


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
        self.template_variables = template_variables
        self._write = output.reply_writer(raw_output)
        self.interactive = sys.stdin.isatty()
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)
        self._first_line = True
        self._saved: set[Path] = set()  # files that this session wrote, and may replace
        first = {"role": "user", "content": "Hello"}  # fails now, not at the first turn
        engine.text.render_chat([*self._opening, first], template_variables=template_variables)

    def run(self) -> None:
        """Read lines and answer them until the end of input, or /quit.

        Raises:
            AtomFlowError: a turn of a piped conversation failed; at a terminal, the session goes on.
        """
        if self.interactive and not self.quiet:
            model, backend = self.engine.checkpoint.path.stem, self.engine.backend
            output.say(f"{model} on {backend.name} ({backend.device}), context of {self.engine.max_seq_len} tokens")
            output.say("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        with _line_editing(self.interactive):
            while (line := self._read_line()) is not None:
                line = line.strip()
                if line == "/quit":
                    return
                try:
                    self._answer(line)
                except AtomFlowError as error:
                    if not self.interactive:
                        raise
                    output.say(f"error: {error}")
                except KeyboardInterrupt:  # meant for a reply that has just ended
                    if not self.interactive:
                        raise
                    output.say("")

    def _answer(self, line: str) -> None:
        """Run a command, or reply to a message; an empty line is ignored.

        At a terminal an unknown command is an error; in a pipe it is a message, such as a path or a comment.
        """
        if not line:
            return
        if self.interactive and line.startswith("//"):
            self.reply(line[1:])
        elif not line.startswith("/"):
            self.reply(line)
        elif not self._command(line):
            if self.interactive:
                output.say(f"There is no command {line}; /help lists them, //TEXT says /TEXT.")
            else:
                self.reply(line)

    def reply(self, text: str) -> None:
        """Answer one message and write the reply to standard output; at a terminal, Ctrl-C ends it early.

        Raises:
            ContextError: the conversation has become too long. The message is discarded.
        """
        message = {"role": "user", "content": text}
        generation: Generation | None = None
        try:
            generation = self.engine.chat(
                [*self.messages, message], self.params, template_variables=self.template_variables
            )
            for piece in generation:
                if not self.as_json:
                    self._write(piece)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            if generation is not None:
                generation.close()
        except ContextError as error:
            raise ContextError(
                f"The conversation no longer fits the context of {self.engine.max_seq_len} tokens; "
                "start a new one with /reset, shorten the message, or come back with a larger --max-seq-len."
            ) from error
        except AtomFlowError:
            if generation is not None and generation.text and not self.as_json:
                output.emit("\n")  # so that the error begins a line
            raise
        if generation is None or (not generation.text and generation.finish_reason == "interrupted"):
            output.say("\n[stopped before the first token; the message is discarded]")
            return
        self.messages += [message, {"role": "assistant", "content": generation.text}]
        if self.as_json:
            output.emit_json(self._record(generation), indent=None)
            return
        if not generation.text.endswith("\n"):
            output.emit("\n")
        self._report(generation)

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
            output.say(
                f"[prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them cached; "
                f"reply {stats.tokens} tokens{speed}]"
            )

    def _command(self, line: str) -> bool:
        """Run a command; False if it is none."""
        name, _, rest = line.partition(" ")
        match name, rest.strip():
            case "/help", "":
                output.say(_HELP)
            case "/reset", "":
                self.messages = list(self._opening)
                self.engine.reset()
                output.say("[new conversation]")
            case "/save", file if file:
                name = os.fsdecode(file.encode(errors="surrogateescape"))  # the bytes typed, in every locale
                self._save(home.expand_user(file_path("FILE", name)))
            case "/save", _:
                output.say("Name the file: /save FILE")
            case _:
                return False
        return True

    def _save(self, path: Path) -> None:
        """Write the conversation.

        Raises:
            DestinationError: the file exists and is not one of this session, or cannot be written.
        """
        record = {"model": str(self.engine.checkpoint.path), "messages": self.messages}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        try:
            target = path.resolve()
            ours = target in self._saved
            write_whole(target if ours else path, text.encode(errors="replace"), replace=ours)
        except FileExistsError as error:
            raise DestinationError(f"{path} exists; choose another name.") from error
        except OSError as error:
            raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
        self._saved.add(path.resolve())
        output.say(f"[saved to {path}]")

    def _read_line(self) -> str | None:
        """The next line, or None at the end of input."""
        try:
            if self.interactive and sys.stdout.isatty():
                return _edited_line()
            if self.interactive:
                output.say(PROMPT, end="")  # standard output is redirected, and gets replies only
            line = read_line(self._first_line)
            self._first_line = False
            return line or None
        except EOFError:
            line = None
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            line = None
        output.say("")  # so that the shell's prompt begins a line
        return line


def _edited_line() -> str:
    """A line typed at a terminal; an empty one if it is no text."""
    try:
        return as_unicode(input(PROMPT), "The line", sys.stdin.encoding)
    except (UnicodeDecodeError, TextError):
        output.say("error: The line is not UTF-8 text; set the terminal to UTF-8.")
        return ""


@contextmanager
def _line_editing(interactive: bool) -> Iterator[None]:
    """Line editing, and a history that is kept between sessions, if Python has readline."""
    try:
        import readline
    except ImportError:
        interactive = False
    if not interactive:
        yield
        return
    file = home.home() / "chat_history"
    with suppress(OSError):  # no history yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):  # a read-only home: no history
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".chat_history.{os.getpid()}")
            readline.write_history_file(partial)
            partial.replace(file.resolve())
