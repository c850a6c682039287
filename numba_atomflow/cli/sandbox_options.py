"""Options of the sandbox's commands, in groups: workload, KV cache, device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.cli import options, output
from numba_atomflow.cli.model_choice import ModelChoice
from numba_atomflow.cli.option_groups import OptionGroup
from numba_atomflow.errors import OptionError, TextError

if TYPE_CHECKING:
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.checkpoint.random_weights import RandomModel
    from numba_atomflow.geometry import ModelGeometry
    from numba_atomflow.sandbox.arrivals import Workload
    from numba_atomflow.sandbox.runner import CacheSizes, Runner

PROMPTS = (
    "You are a helpful assistant. Answer in one sentence. What is the capital of France?",
    "You are a helpful assistant. Answer in one sentence. Why is the sky blue?",
    "You are a helpful assistant. Answer in one sentence. Name three rivers.",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three most important inventions of the twentieth century were",
    "Water boils at a temperature that depends on",
    "You are a helpful assistant. Answer in one sentence. What is a page table?",
)
_RANDOM_PROMPT_TOKENS = 64  # of a model without a tokenizer


@contextmanager
def open_weights(model: ModelChoice) -> "Iterator[Checkpoint | RandomModel]":
    """The checkpoint or the random weights that a command line names.

    Raises:
        OptionError, CheckpointError: as `ChosenModel`.
    """
    source = model.find().source

    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.checkpoint.random_weights import RandomModel

    if isinstance(source, Path):
        with Checkpoint.open(source) as checkpoint:
            yield checkpoint
    else:
        yield RandomModel(source, name=model.geometry or "random")


@dataclass(frozen=True)
class WorkloadOptions(OptionGroup):
    """Which requests arrive, and when."""

    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Requests to serve.", show_default=False)
    ] = None
    poisson: Annotated[
        float | None,
        typer.Option(
            "--poisson", metavar="RATE", help="Poisson arrivals, RATE requests per second.", show_default=False
        ),
    ] = None
    requests: Annotated[int, typer.Option("--requests", metavar="N", help="Requests of --poisson.")] = 16
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", metavar="N", help="Random prompts of N tokens, instead of text.", show_default=False
        ),
    ] = None
    common_tokens: Annotated[
        int, typer.Option("--common-tokens", metavar="N", help="Length of the random prompts' common prefix.")
    ] = 0
    max_tokens: options.MaxTokens = 32
    ignore_eos: options.IgnoreEos = False
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of arrivals and random prompts.")] = 0

    def check(self) -> None:
        """Raises:
        OptionError: there is no workload, or there are two.
        """
        if (self.trace is None) == (self.poisson is None):
            raise OptionError(
                "Requests come from a trace or from Poisson arrivals; give either --trace FILE or --poisson RATE."
            )

    def make(self, weights: "Checkpoint | RandomModel") -> "Workload":
        """The workload for a model.

        Raises:
            OptionError: a number is out of range, or a line of the trace is not a valid request.
            TextError: the trace cannot be read, or the tokenizer does not fit the model.
        """
        from numba_atomflow.sandbox.arrivals import poisson_arrivals, read_trace

        encode, end_tokens = _tokenizer(weights, self.ignore_eos)
        if self.trace is not None:
            return read_trace(self.trace, encode, weights.geometry.vocabulary, end_tokens)
        prompts = self._prompts(encode, weights.geometry.vocabulary)
        return poisson_arrivals(self.poisson or 0.0, prompts, self.max_tokens, end_tokens, self.seed)

    def _prompts(self, encode: Callable[[str], list[int]] | None, vocabulary: int) -> list[list[int]]:
        from numba_atomflow.sandbox.arrivals import random_prompts

        if encode is None or self.prompt_tokens is not None:
            length = self.prompt_tokens or _RANDOM_PROMPT_TOKENS
            return random_prompts(self.requests, length, vocabulary, self.common_tokens, self.seed)
        if self.requests < 1:
            raise OptionError(f"--requests {self.requests} is not a number of requests; give 1 or more.")
        prompts = [encode(PROMPTS[i % len(PROMPTS)]) for i in range(self.requests)]
        largest = max(map(max, prompts))
        if largest >= vocabulary:
            raise TextError(
                f"The tokenizer makes token {largest}, but the model has {vocabulary}; get the model again, or give "
                "--prompt-tokens for random prompts."
            )
        return prompts


def _tokenizer(
    weights: "Checkpoint | RandomModel", ignore_eos: bool
) -> tuple[Callable[[str], list[int]] | None, frozenset[int]]:
    """The encoder, and the tokens that end a generation; None and an empty set for a model without a tokenizer."""
    if weights.text.tokenizer_json is None:
        return None, frozenset()
    from numba_atomflow.text.codec import TextCodec

    text = TextCodec(weights.text)
    return text.encode, frozenset() if ignore_eos else frozenset(text.eos_ids)


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """KV cache and batch."""

    blocks: Annotated[int, typer.Option("--blocks", metavar="N", help="KV blocks of the cache.")] = 256
    block_size: Annotated[int, typer.Option("--block-size", metavar="N", help="Positions per KV block.")] = 16
    max_sequences: Annotated[
        int, typer.Option("--max-sequences", metavar="N", help="Maximum number of running requests.")
    ] = 8
    token_budget: Annotated[
        int | None,
        typer.Option(
            "--token-budget",
            metavar="N",
            help="Maximum number of tokens per step, of prompts too.  [default: what the device allows]",
        ),
    ] = None

    def sizes(self, geometry: "ModelGeometry") -> "CacheSizes":
        """Sizes of the KV cache.

        Raises:
            OptionError: a number is out of range.
        """
        from numba_atomflow.sandbox.runner import cache_sizes

        return cache_sizes(geometry, self.blocks, (self.block_size,), self.max_sequences)

    def running_limit(self, max_batched_tokens: int) -> int:
        """Running requests at most: each one has a token in every step."""
        return min(self.max_sequences, self.token_budget or max_batched_tokens)


@dataclass(frozen=True)
class DeviceOptions(OptionGroup):
    """Where the model runs."""

    backend: options.Backend = options.BackendChoice.AUTO
    threads: options.Threads = None

    @contextmanager
    def runner(self, weights: "Checkpoint | RandomModel", sizes: "CacheSizes") -> "Iterator[Runner]":
        """The model on the device, ready to run; closed at the end."""
        from numba_atomflow.checkpoint.arrays import WeightArrays
        from numba_atomflow.sandbox.choose import make_runner

        with output.loading_bar() as progress:
            arrays, check = WeightArrays(weights), weights.check_unchanged
            runner = make_runner(self.backend.value, weights.geometry, arrays, sizes, self.threads, check)
            try:
                runner.prepare(progress)
                check()
            except BaseException:
                runner.close()
                raise
        try:
            yield runner
        finally:
            runner.close()


# --- lists of numbers ------------------------------------------------------------------------------------------------


def numbers_of(option: str, text: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers.

    Raises:
        OptionError: it is not a list of numbers of 1 or more.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} {text} is not a list of numbers; give for example {option} 8,16.") from error
    if min(numbers) < 1:
        raise OptionError(f"{option} {text} has a number below 1; correct it.")
    return numbers


def contexts_of(option: str, text: str | None, default: str, limit: int) -> tuple[int, ...]:
    """Context lengths: those given, or those of the default that the model allows.

    Raises:
        OptionError: one is longer than the model allows.
    """
    if text is None:
        return tuple(context for context in numbers_of(option, default) if context <= limit)
    numbers = numbers_of(option, text)
    if max(numbers) > limit:
        raise OptionError(f"{option} {text} goes beyond the {limit} positions that this model allows; shorten it.")
    return numbers
