"""``numba-atomflow generate``: continue a text, or answer it, streamed to standard output."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.cli.logprob_report import LogprobOptions, LogprobReport
from numba_atomflow.errors import OptionError
from numba_atomflow.files.text_input import read_standard_input, read_text_file
from numba_atomflow.host.machine import versions

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, Generation
    from numba_atomflow.sampling import SamplingParams

EXAMPLES = """\b
Examples:
  numba-atomflow generate "The capital of France is"
  numba-atomflow generate --chat "Name three rivers." --temperature 0.7 --seed 1
  numba-atomflow generate --file story.txt --max-tokens 100 --stop "The end"
  git diff | numba-atomflow generate --chat - --quiet
  numba-atomflow generate --max-tokens 20 -- "- milk, - bread,"
  numba-atomflow generate --file book.txt --max-tokens 1 --save-state book.kv
  numba-atomflow generate --file book-and-question.txt --load-state book.kv
  numba-atomflow generate --chat "Invent a person." --json-schema person.json
  numba-atomflow generate "The capital of France is" --max-tokens 3 --logprobs 5
  numba-atomflow generate --model large.safetensors --draft small.safetensors "Once upon a time"
  numba-atomflow generate "1, 2, 3," --json | jq .stats.tokens_per_second
"""


def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue (after -- if it begins with a dash); - reads standard input.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="A file with the prompt; - reads standard input."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Ask the prompt as a question (chat template), or continue it as it is."),
    ] = False,
    model: options.Model = DEFAULT_MODEL,
    sampling: options.SamplingOptions,
    constraints: options.ConstraintOptions,
    logprobs: LogprobOptions,
    ignore_eos: options.IgnoreEos = False,
    template_var: options.TemplateVar = None,
    max_seq_len: options.MaxSeqLen = None,
    draft: options.Draft = None,
    state: options.StateOptions,
    engine_options: options.EngineOptions,
    raw_output: options.RawOutput = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a text, or answer a question.

    Tokens are written as they are generated. One newline at the end of a file or of standard input is not part of the
    prompt.
    """
    text = _read_prompt(prompt, file)
    variables = options.template_variables(template_var)
    if variables and not chat:
        raise OptionError("--template-var is for chat templates; give --chat as well.")
    state.check()
    sampling.check_draft(draft)
    constraint = constraints.constraint()

    from numba_atomflow.text import template_process

    with template_process.prestarted() if chat else nullcontext():  # starts while numba is imported
        params = replace(sampling.params(ignore_eos, constraint), **vars(logprobs))
        with engine_options.load(model, max_seq_len, draft) as engine:
            state.load(engine)
            generation = (
                engine.chat([{"role": "user", "content": text}], params, template_variables=variables)
                if chat
                else engine.generate(text, params)
            )
            if as_json:
                generation.finish()
                record = _record(engine, generation, params)
                output.emit_json(record | LogprobReport(engine, generation).record())
            else:
                _stream(generation, output.reply_writer(raw_output))
                if logprobs.requested():
                    output.emit(LogprobReport(engine, generation).table())
            state.save(engine)
            if not quiet and not as_json:
                output.say(_report(engine, generation))


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None and prompt is not None:
        raise OptionError("There are two prompts, the argument and --file; give one of them.")
    if prompt == "-" or (file is not None and str(file) == "-"):
        text = read_standard_input().removesuffix("\n")
    elif file is not None:
        text = read_text_file(file, "--file").removesuffix("\n")
    elif prompt is not None:
        text = prompt
    else:
        raise OptionError(
            "There is no prompt; give a text (after -- if it begins with a dash), --file FILE, or - for standard input."
        )
    if not text:
        raise OptionError("The prompt is empty; give some text.")
    return text


def _stream(generation: "Generation", write: Callable[[str], None]) -> None:
    try:
        for piece in generation:
            write(piece)
    finally:
        if generation.text and not generation.text.endswith("\n"):
            output.emit("\n")


def _report(engine: "Engine", generation: "Generation") -> str:
    stats = generation.stats
    speed = "no decode speed of one token"
    if stats.tokens > 1:
        read = engine.weight_bytes_per_token * stats.steps_per_second / 1e9
        speed = f"{stats.tokens_per_second:.1f} tok/s, TPOT {stats.tpot * 1e3:.1f} ms, {read:.2f} GB/s of weights"
    constraint = ""
    if stats.constraint_seconds:
        constraint = f"masks    {stats.constraint_seconds / stats.tokens * 1e3:.2f} ms per token\n"
    accepted = ""
    if stats.proposed:
        accepted = (
            f"accepted {stats.accepted} of {stats.proposed} proposed tokens, "
            f"{stats.mean_accepted_length:.2f} tokens per step\n"
        )
    draft = ""
    if engine.draft is not None:
        name = engine.draft.checkpoint.path.stem
        draft = f"draft    {name}, {stats.drafting_seconds:.2f} of {stats.decode_seconds:.2f} s of decoding\n"
    backend = engine.backend
    cached = f", {stats.reused_tokens} of them cached" if stats.reused_tokens else ""
    return (
        f"\nbackend  {backend.name} ({backend.device}), loaded in {engine.load_seconds:.2f} s\n"
        f"prompt   {stats.prompt_tokens} tokens{cached}, TTFT {stats.ttft:.3f} s\n"
        f"decode   {stats.tokens} tokens, {speed}\n{accepted}{draft}{constraint}"
        f"finish   {generation.finish_reason}"
    )


def _record(engine: "Engine", generation: "Generation", params: "SamplingParams") -> dict[str, Any]:
    sampling = [field.name for field in fields(options.SamplingOptions)]
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "stats": output.stats_record(engine, generation.stats),
        "model": {
            "path": str(engine.checkpoint.path),
            "parameters": engine.geometry.parameter_count(),
            "max_seq_len": engine.max_seq_len,
            "draft": None if engine.draft is None else str(engine.draft.checkpoint.path),
        },
        "sampling": {name: getattr(params, name) for name in (*sampling, "ignore_eos")},
        "backend": {"name": engine.backend.name, "device": engine.backend.device},
        "versions": versions(),
    }
