"""All commands in one typer application."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from numba_atomflow import __version__, home
from numba_atomflow.cli import output
from numba_atomflow.cli.batch import PERPLEXITY_EXAMPLES as BATCH_PERPLEXITY_EXAMPLES
from numba_atomflow.cli.batch import RUN_EXAMPLES as BATCH_RUN_EXAMPLES
from numba_atomflow.cli.batch import VALIDATE_EXAMPLES as BATCH_VALIDATE_EXAMPLES
from numba_atomflow.cli.batch import perplexity as batch_perplexity
from numba_atomflow.cli.batch import run as batch_run
from numba_atomflow.cli.batch import validate as batch_validate
from numba_atomflow.cli.bench import EXAMPLES as BENCH_EXAMPLES
from numba_atomflow.cli.bench import bench
from numba_atomflow.cli.chat import EXAMPLES as CHAT_EXAMPLES
from numba_atomflow.cli.chat import chat
from numba_atomflow.cli.convert import EXAMPLES as CONVERT_EXAMPLES
from numba_atomflow.cli.convert import convert
from numba_atomflow.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from numba_atomflow.cli.generate import generate
from numba_atomflow.cli.ground_truth import EXAMPLES as GROUND_TRUTH_EXAMPLES
from numba_atomflow.cli.ground_truth import ground_truth
from numba_atomflow.cli.info import EXAMPLES as INFO_EXAMPLES
from numba_atomflow.cli.info import info
from numba_atomflow.cli.option_groups import with_groups
from numba_atomflow.cli.parameters import as_typed, names_as_typed, refuse_empty_paths
from numba_atomflow.cli.perplexity import EXAMPLES as PERPLEXITY_EXAMPLES
from numba_atomflow.cli.perplexity import perplexity
from numba_atomflow.cli.profile import EXAMPLES as PROFILE_EXAMPLES
from numba_atomflow.cli.profile import profile
from numba_atomflow.cli.quantize import EXAMPLES as QUANTIZE_EXAMPLES
from numba_atomflow.cli.quantize import quantize
from numba_atomflow.cli.sandbox import COMPARE_EXAMPLES, RUN_EXAMPLES
from numba_atomflow.cli.sandbox import compare as sandbox_compare
from numba_atomflow.cli.sandbox import run as sandbox_run
from numba_atomflow.cli.serve import EXAMPLES as SERVE_EXAMPLES
from numba_atomflow.cli.serve import serve
from numba_atomflow.cli.validate import EXAMPLES as VALIDATE_EXAMPLES
from numba_atomflow.cli.validate import validate
from numba_atomflow.errors import OptionError
from numba_atomflow.files.text_input import as_unicode
from numba_atomflow.host import numba_settings

PROGRAM = "numba-atomflow"

# The base class of all errors in a command line: click's, or a copy of it in typer, depending on typer's version.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_EXAMPLES = """\b
Examples:
  numba-atomflow generate "The capital of France is" --max-tokens 32
  numba-atomflow chat
  numba-atomflow convert path/to/model.gguf my-model.safetensors
  numba-atomflow info my-model.safetensors

\b
Models and compiled code are in your cache folder, or in $NUMBA_ATOMFLOW_HOME; `numba-atomflow info` shows it.
"""


def _show_help(context: Any, _option: Any, requested: bool) -> None:
    if requested and not context.resilient_parsing:
        output.emit(context.get_help() + "\n")
        raise typer.Exit


class _HelpThroughOutput:
    """``--help`` is written as every other result: a full disk is reported in a sentence."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option


class _Command(_HelpThroughOutput, TyperCommand):
    """A command."""


class _Group(_HelpThroughOutput, TyperGroup):
    """The program."""


# Arguments and options that are text for the model. A path keeps its bytes, which may be no text.
_TEXTS = {"prompt": "The prompt", "system": "--system", "stop": "--stop", "template_var": "--template-var"}


def _prepared(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its groups of options, with ``~`` in paths replaced, and texts as Unicode in every locale; its
    errors name options as on the command line.
    """
    command = with_groups(command)
    refuse_empty_paths(command)

    def prepare(name: str, value: Any) -> Any:
        if isinstance(value, Path):
            return home.expand_user(value)
        if name in _TEXTS and isinstance(value, str):
            return as_unicode(value, _TEXTS[name])
        if name in _TEXTS and isinstance(value, list):
            return [as_unicode(text, _TEXTS[name]) for text in value]
        return value

    @wraps(command)
    def run(**values: Any) -> None:
        numba_settings.check_import()
        try:
            command(**{name: prepare(name, value) for name, value in values.items()})
        except OptionError as error:
            raise OptionError(as_typed(str(error), names_as_typed(command))) from error

    return run


# Plain help: it starts faster than a rich one, and keeps examples as they are written.
app = typer.Typer(cls=_Group, rich_markup_mode=None, add_completion=False, epilog=_EXAMPLES)
app.command(cls=_Command, epilog=GENERATE_EXAMPLES)(_prepared(generate))
app.command(cls=_Command, epilog=CHAT_EXAMPLES)(_prepared(chat))
app.command(cls=_Command, epilog=SERVE_EXAMPLES)(_prepared(serve))
app.command(cls=_Command, epilog=CONVERT_EXAMPLES)(_prepared(convert))
app.command(cls=_Command, epilog=QUANTIZE_EXAMPLES)(_prepared(quantize))
app.command(cls=_Command, epilog=PERPLEXITY_EXAMPLES)(_prepared(perplexity))
app.command(cls=_Command, epilog=INFO_EXAMPLES)(_prepared(info))
app.command(cls=_Command, epilog=GROUND_TRUTH_EXAMPLES)(_prepared(ground_truth))
app.command(cls=_Command, epilog=VALIDATE_EXAMPLES)(_prepared(validate))
app.command(cls=_Command, epilog=BENCH_EXAMPLES)(_prepared(bench))
app.command(cls=_Command, epilog=PROFILE_EXAMPLES)(_prepared(profile))
batch = typer.Typer(cls=_Group, rich_markup_mode=None)
batch.command("run", cls=_Command, epilog=BATCH_RUN_EXAMPLES)(_prepared(batch_run))
batch.command("perplexity", cls=_Command, epilog=BATCH_PERPLEXITY_EXAMPLES)(_prepared(batch_perplexity))
batch.command("validate", cls=_Command, epilog=BATCH_VALIDATE_EXAMPLES)(_prepared(batch_validate))
app.add_typer(batch, name="batch")
sandbox = typer.Typer(cls=_Group, rich_markup_mode=None)
sandbox.command("run", cls=_Command, epilog=RUN_EXAMPLES)(_prepared(sandbox_run))
sandbox.command("compare", cls=_Command, epilog=COMPARE_EXAMPLES)(_prepared(sandbox_compare))
app.add_typer(sandbox, name="sandbox")


def invoke(arguments: Sequence[str]) -> int:
    """Parse and run a command line; the exit code.

    Not by typer's ``app()``: exit codes and the form of an error differ from what the command line promises.

    Raises:
        OptionError: the command line is wrong.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except _UsageError as error:
        at = getattr(error, "ctx", None)
        where = at.command_path if at else PROGRAM
        message = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        message = " ".join(message.split()).rstrip(".")
        raise OptionError(f"{message}{_dash_advice(message, arguments)}; see `{where} --help`.") from error
    return 0


def _dash_advice(message: str, arguments: Sequence[str]) -> str:
    """Advice for a text or a file that was taken for an option; "" if there is no sign of that."""
    no_option = re.compile(r"-(?!-?[A-Za-z]|$)|-[^-].*\s|--[^=]*\s")
    mistaken = re.match("No such option: -[^-]", message) or any(
        map(no_option.match, itertools.takewhile(lambda argument: argument != "--", arguments))
    )
    return " (put -- before an argument that begins with a dash)" if mistaken else ""


def _show_version(requested: bool) -> None:
    if requested:
        output.emit(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run a Llama-family language model with FP8 weights on this machine: low latency for one user."""
    if context.invoked_subcommand is None:
        output.emit(context.get_help() + "\n")


@batch.callback(invoke_without_command=True)
def _batch(context: typer.Context) -> None:
    """Run many prompts or texts over CPU cores, GPUs or a Ray cluster.

    The results are a folder; a batch that was interrupted continues where it stopped.
    """
    if context.invoked_subcommand is None:
        output.emit(context.get_help() + "\n")


@sandbox.callback(invoke_without_command=True)
def _sandbox(context: typer.Context) -> None:
    """Serve many requests with a paged KV cache.

    Continuous batching, prefix caching, copy-on-write and preemption; and measurements of their cost.
    """
    if context.invoked_subcommand is None:
        output.emit(context.get_help() + "\n")
