"""Options that several commands share: one name, default, help text and error for one thing.

Ranges are checked in one place, by `SamplingParams` and `Engine.load`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from numba_atomflow.cli import output
from numba_atomflow.cli.option_groups import OptionGroup
from numba_atomflow.errors import OptionError
from numba_atomflow.files.destination import check_destination_in_folder
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.files.untrusted import quote

if TYPE_CHECKING:
    from numba_atomflow.constraints import Constraint
    from numba_atomflow.engine import Engine
    from numba_atomflow.sampling import SamplingParams


class BackendChoice(StrEnum):
    """Values of --backend."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DecodeChoice(StrEnum):
    """Values of --decode."""

    AUTO = "auto"
    GRAPH = "graph"
    PERSISTENT = "persistent"


class SpeculateChoice(StrEnum):
    """Values of --speculate."""

    AUTO = "auto"
    OFF = "off"
    LOOKUP = "lookup"
    DRAFT = "draft"


class PrefillChoice(StrEnum):
    """Values of --prefill."""

    AUTO = "auto"
    GEMV = "gemv"
    GEMM = "gemm"
    FP8 = "fp8"


# --- models ----------------------------------------------------------------------------------------------------------

MODEL_HELP = "A checkpoint file, or the name of one in the models folder."

Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A GGUF file, a Hugging Face folder with safetensors weights, or a model of the hub: org/name, or "
        "org/name/file.gguf.",
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DEST", help="The checkpoint file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model of the hub.  [default: main]"),
]

# --- the engine ------------------------------------------------------------------------------------------------------

Backend = Annotated[BackendChoice, typer.Option("--backend", help="Where to run; auto: on a GPU if one can be used.")]
Decode = Annotated[
    DecodeChoice,
    typer.Option(
        "--decode",
        help="Decode steps on a GPU: a CUDA graph of kernels (graph) or one persistent kernel; auto: persistent if "
        "the GPU and the model allow it.",
    ),
]
Prefill = Annotated[
    PrefillChoice,
    typer.Option(
        "--prefill",
        help="Prompts on a GPU: up to 8 tokens at a time in the kernels of decode steps (gemv), or in chunks of many "
        "tokens (gemm), or those with activations in FP8 (fp8); auto: gemm, from compute capability 8.0 on.",
    ),
]
Gpus = Annotated[
    str,
    typer.Option(
        "--gpus",
        metavar="N",
        help="GPUs that share the model, each with its part of every matrix: a number, or all.",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        metavar="N",
        help="Tokens of a prompt at a time, on a GPU with gemm or fp8.  [default: 2048, or less if the context is]",
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Tokens of a window.  [default: 1024, or less if the model has less]"),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", metavar="M", help="New tokens of each window.  [default: half of the context]"),
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
    typer.Option("--threads", metavar="N", help="CPU threads.  [default: one per core, or the CPU quota]"),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="A smaller model of the same tokens, whose proposals are checked: the same text, sooner if it is good.",
    ),
]
PrivateCopy = Annotated[
    bool,
    typer.Option(
        "--private-copy", help="Read the weights into memory instead of mapping their file, which may then be changed."
    ),
]


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """How a model is run."""

    backend: Backend = BackendChoice.AUTO
    decode: Decode = DecodeChoice.AUTO
    prefill: Prefill = PrefillChoice.AUTO
    prefill_chunk: PrefillChunk = None
    threads: Threads = None
    private_copy: PrivateCopy = False
    gpus: Gpus = "1"

    def load(self, model: str | Path, max_seq_len: int | None, draft: str | None = None) -> "Engine":
        """An engine that is ready to run, with a draft model if one is named, and a progress bar until then."""
        from numba_atomflow.engine import Engine

        with output.loading_bar() as progress:
            engine = Engine.load(
                model,
                self.backend.value,
                max_seq_len,
                self.threads,
                progress,
                decode=self.decode.value,
                private_copy=self.private_copy,
                prefill=self.prefill.value,
                prefill_chunk=self.prefill_chunk,
                gpus=gpus_of(self.gpus),
                draft=draft,
            )
        engine.backend.show_compiling(output.steps_bar)
        if engine.draft is not None:
            engine.draft.backend.show_compiling(output.steps_bar)
        return engine

    def on_cpu(self) -> "EngineOptions":
        """The same for the CPU backend, without what only the CUDA backend has."""
        return EngineOptions(BackendChoice.CPU, threads=self.threads, private_copy=self.private_copy)

    def on_one_gpu(self) -> "EngineOptions":
        """The same on one GPU, in the kernel that several have."""
        return replace(self, gpus="1", decode=DecodeChoice.PERSISTENT, prefill=PrefillChoice.GEMV)


def gpus_of(text: str) -> int | Literal["all"]:
    """The value of --gpus.

    Raises:
        OptionError: it is neither a whole number from 1 on nor "all".
    """
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise OptionError(f"--gpus is {quote(text)}; it must be a whole number from 1 on, or all.")
    return int(text)


# --- sampling --------------------------------------------------------------------------------------------------------

MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", metavar="N", help="Maximum number of tokens to generate.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", metavar="T", help="0: always the most likely token; 1: the model's own distribution."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Sample from the K most likely tokens; 0: from all.")]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", help="Sample from the most likely tokens that together reach P.")
]
MinP = Annotated[
    float, typer.Option("--min-p", metavar="P", help="Drop tokens less likely than P times the most likely one.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1: make tokens that occurred before less likely."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.  [default: random]")
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the reply before this text; repeatable.")
]
Speculate = Annotated[
    SpeculateChoice,
    typer.Option(
        "--speculate",
        help="Check several proposed tokens per step: what followed the last tokens earlier (lookup), what --draft "
        "generates (draft), or none (off). The text is the same, sooner; auto: draft if given, else lookup on a CPU.",
    ),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Continue after the end-of-sequence token (for benchmarks).")
]
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="NAME=VALUE",
        help="A variable for the chat template, as enable_thinking=false; VALUE is JSON or text; repeatable.",
    ),
]


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """How tokens are chosen, and when a reply ends."""

    max_tokens: MaxTokens = 512
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None
    stop: Stop = None
    speculate: Speculate = SpeculateChoice.AUTO

    def params(self, ignore_eos: bool = False, constraint: "Constraint | None" = None) -> "SamplingParams":
        """The same for an engine.

        Raises:
            OptionError: a value is out of range.
        """
        from numba_atomflow.sampling import SamplingParams

        rest = {"stop": tuple(self.stop or ()), "ignore_eos": ignore_eos, "constraint": constraint}
        return SamplingParams(**vars(self) | rest)

    def check_draft(self, draft: str | None) -> None:
        """Refuse a draft model that would not be used, or a missing one, before a model is loaded.

        Raises:
            OptionError: --speculate and --draft contradict each other.
        """
        if draft is None and self.speculate is SpeculateChoice.DRAFT:
            raise OptionError("--speculate draft needs a draft model; give --draft MODEL as well.")
        if draft is not None and self.speculate in (SpeculateChoice.OFF, SpeculateChoice.LOOKUP):
            raise OptionError(f"--draft is not for --speculate {self.speculate}; leave one of them out.")


JsonSchemaFile = Annotated[
    Path | None,
    typer.Option("--json-schema", metavar="FILE", help="A file with a JSON schema; the reply is JSON that it accepts."),
]
GrammarFile = Annotated[
    Path | None,
    typer.Option("--grammar", metavar="FILE", help="A file with a grammar, Lark or GBNF; the reply matches it."),
]


@dataclass(frozen=True)
class ConstraintOptions(OptionGroup):
    """What the reply must satisfy."""

    json_schema: JsonSchemaFile = None
    grammar: GrammarFile = None

    def constraint(self) -> "Constraint | None":
        """The same for an engine.

        Raises:
            OptionError: there are two, or one is malformed.
            TextError: a file cannot be read.
        """
        if self.json_schema is not None and self.grammar is not None:
            raise OptionError("A reply has one constraint; give --json-schema or --grammar.")
        if self.json_schema is not None:
            from numba_atomflow.constraints import JsonSchema

            return JsonSchema(read_text_file(self.json_schema, "--json-schema"))
        if self.grammar is not None:
            from numba_atomflow.constraints import Grammar

            return Grammar(read_text_file(self.grammar, "--grammar"))
        return None


# --- the KV cache as a file ------------------------------------------------------------------------------------------

STATE_BAR_AFTER = 2.0  # seconds; most files of a KV cache take less

LoadState = Annotated[
    Path | None,
    typer.Option(
        "--load-state",
        metavar="FILE",
        help="A KV cache that was saved with this model: what the prompt has in common with it is not computed again.",
    ),
]
SaveState = Annotated[
    Path | None, typer.Option("--save-state", metavar="FILE", help="Write the KV cache to FILE when the reply ends.")
]


@dataclass(frozen=True)
class StateOptions(OptionGroup):
    """Where the KV cache comes from and goes to."""

    load_state: LoadState = None
    save_state: SaveState = None
    overwrite: Overwrite = False

    def check(self) -> None:
        """Refuse a file that cannot be written before a reply is generated.

        Raises:
            OptionError: --overwrite without --save-state.
            DestinationError: the file exists, or its folder does not.
        """
        if self.save_state is not None:
            check_destination_in_folder(self.save_state, self.overwrite)
        elif self.overwrite:
            raise OptionError("--overwrite is for the file of --save-state; give that as well.")

    def load(self, engine: "Engine") -> None:
        """Put the saved KV cache into the engine."""
        if self.load_state is not None:
            with output.bytes_bar(after=STATE_BAR_AFTER) as progress:
                engine.load_state(self.load_state, progress)

    def save(self, engine: "Engine") -> None:
        """Write the engine's KV cache."""
        if self.save_state is not None:
            with output.bytes_bar(after=STATE_BAR_AFTER) as progress:
                engine.save_state(self.save_state, overwrite=self.overwrite, progress=progress)


# --- output ----------------------------------------------------------------------------------------------------------

RawOutput = Annotated[
    bool,
    typer.Option("--raw-output", help="Send the model's control characters to the terminal instead of escaping them."),
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
