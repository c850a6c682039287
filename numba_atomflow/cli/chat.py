"""``numba-atomflow chat``: a conversation, at a terminal or through a pipe."""

import sys
from typing import Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError

EXAMPLES = """\b
Examples:
  numba-atomflow chat
  numba-atomflow chat --model my-model.safetensors --system "Answer in one sentence."
  numba-atomflow chat --temperature 0.7 --top-p 0.9
  printf 'Name a river.\\nAnd another one.\\n' | numba-atomflow chat --quiet
  numba-atomflow chat --json < questions.txt | jq .text

\b
In the conversation, lines that begin with / are commands: /help, /reset, /save FILE, /quit. To say /TEXT, type //TEXT.
In a pipe, a line that begins with / and is none of these commands is a message like any other.
Ctrl-C stops a reply; at the prompt, it leaves.
"""


def chat(
    model: options.Model = DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="What the model is told before you speak.")
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    max_seq_len: options.MaxSeqLen = None,
    threads: options.Threads = None,
    private_copy: options.PrivateCopy = False,
    backend: options.Backend = options.BackendChoice.AUTO,
    decode: options.Decode = options.DecodeChoice.AUTO,
    template_var: options.TemplateVar = None,
    raw_output: options.RawOutput = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each reply as one line of JSON, and nothing else (not at a terminal).")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model. Through a pipe, each line is a turn, and standard output holds the replies alone."""
    if as_json and sys.stdin.isatty():
        raise OptionError("--json is for a conversation through a pipe; give the messages on standard input.")

    variables = options.template_variables(template_var)

    from numba_atomflow.text import template_process

    with template_process.running():  # gets ready while numba is imported
        from numba_atomflow.cli.chat_session import ChatSession
        from numba_atomflow.engine import Engine
        from numba_atomflow.sampling import SamplingParams

        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
        )
        with output.loading_bar() as progress:
            engine = Engine.load(
                model, backend.value, max_seq_len, threads, progress, decode=decode.value, private_copy=private_copy
            )
        with engine:
            ChatSession(engine, params, system, variables, quiet=quiet, as_json=as_json, raw_output=raw_output).run()
