"""Options that several commands share. Ranges are checked in one place, by `SamplingParams` and `Engine.load`."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from numba_atomflow.errors import OptionError


class BackendChoice(StrEnum):
    """What may be given for --backend."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DecodeChoice(StrEnum):
    """What may be given for --decode."""

    AUTO = "auto"
    GRAPH = "graph"
    PERSISTENT = "persistent"


Model = Annotated[
    str, typer.Option("--model", "-m", help="A checkpoint file, or the name of one in the models folder.")
]
Source = Annotated[
    str,
    typer.Argument(
        help="A GGUF file, a Hugging Face folder with safetensors weights, or a model of the hub: org/name, or "
        "org/name/file.gguf."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Of a model of the hub: branch, tag or commit.  [default: main]"),
]
Backend = Annotated[BackendChoice, typer.Option("--backend", help="auto takes the best one that can run here.")]
Decode = Annotated[
    DecodeChoice,
    typer.Option(
        "--decode",
        help="How the GPU makes a token: kernel after kernel (graph), or in one (persistent); auto: in one if it can.",
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(
        "--max-seq-len",
        metavar="N",
        help="Positions of the KV cache: prompt and reply must fit.  [default: 4096, or less if the model has less]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Cores to use; fewer are faster where other programs keep some busy.  [default: all, or the CPU quota]",
    ),
]

PrivateCopy = Annotated[
    bool,
    typer.Option("--private-copy", help="Read the whole model into memory: its file may then be written into."),
]

Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0: always the most likely token; 1: the model's own distribution.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among the K most likely tokens; 0: among all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Choose among the most likely tokens that together reach P.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than P times the most likely one.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: make tokens that were there already less likely.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.  [default: a fresh one]")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of a reply.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the reply before this text; repeatable.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token (for benchmarks).")]
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="NAME=VALUE",
        help="Tell the chat template more, as in enable_thinking=false; VALUE is JSON or a text; repeatable.",
    ),
]

RawOutput = Annotated[
    bool,
    typer.Option("--raw-output", help="Send the model's control characters to the terminal, instead of showing them."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No report on standard error.")]


def template_variables(settings: Sequence[str] | None) -> dict[str, Any]:
    """The values of --template-var by name.

    Raises:
        OptionError: one of them names nothing, or a name is there twice or reserved.
    """
    if not settings:
        return {}
    from numba_atomflow.text.chat_template import plain_variables

    variables: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise OptionError(f"--template-var {setting} has no name and value; write NAME=VALUE.")
        if name in variables:
            raise OptionError(f"--template-var gives {name} twice; give it once.")
        try:
            variables[name] = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):  # not JSON: a text that needs no quotes
            variables[name] = value
    return plain_variables(variables)


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are no JSON
