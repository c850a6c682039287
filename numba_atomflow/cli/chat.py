"""``numba-atomflow chat``: a conversation, at a terminal or through a pipe."""

import sys
from typing import Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options
from numba_atomflow.errors import OptionError

EXAMPLES = """\b
Examples:
  numba-atomflow chat
  numba-atomflow chat --model my-model.safetensors --system "Answer in one sentence."
  numba-atomflow chat --temperature 0.7 --top-p 0.9
  numba-atomflow chat --template-var enable_thinking=false
  printf 'Name a river.\\nAnd another one.\\n' | numba-atomflow chat --quiet
  numba-atomflow chat --json < questions.txt | jq .text

\b
In the conversation, lines that begin with / are commands, such as /undo, /retry, /save FILE and /load FILE; /help has
all of them, with examples. To say /TEXT, type //TEXT. In a pipe, a line that begins with / and is none of the commands
is a message like any other.
A line that ends in a backslash continues on the next one; lines between two lines of three quotes are one message.
Ctrl-C stops a reply; twice, it leaves.
"""


def chat(
    *,
    model: options.Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")] = None,
    sampling: options.SamplingOptions,
    template_var: options.TemplateVar = None,
    max_seq_len: options.MaxSeqLen = None,
    draft: options.Draft = None,
    engine_options: options.EngineOptions,
    raw_output: options.RawOutput = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each reply as one line of JSON, and nothing else (not at a terminal).")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model. Through a pipe, each line is a turn, and standard output holds the replies alone."""
    if as_json and sys.stdin.isatty():
        raise OptionError("--json is for a conversation through a pipe; give the messages on standard input.")

    sampling.check_draft(draft)
    variables = options.template_variables(template_var)

    from numba_atomflow.text import template_process

    with template_process.prestarted():  # starts while numba is imported
        from numba_atomflow.cli.chat_session import ChatSession

        params = sampling.params()
        with engine_options.load(model, max_seq_len, draft) as engine:
            ChatSession(engine, params, system, variables, quiet=quiet, as_json=as_json, raw_output=raw_output).run()
