"""Benchmark with real text: decode speed of given prompts, with and without speculation.

Random tokens say nothing about speculation, whose speed depends on how much a reply repeats. Each prompt is decoded in
turns with and without, the order alternating; the first pair is a discarded warm-up. Decoding is greedy, and the tokens
of all turns are compared: they must be the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from numba_atomflow.backends.base import DecodePath
from numba_atomflow.engine import Engine, GenerationStats
from numba_atomflow.errors import AtomFlowError, OptionError
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.files.untrusted import load_json, quote
from numba_atomflow.host.machine import machine_record
from numba_atomflow.sampling import SamplingParams, Speculate
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.stats import Spread

FORMAT = "numba-atomflow workload 1"


class Prompt(NamedTuple):
    """A text to continue, or a message to answer."""

    text: str
    chat: bool


@dataclass(frozen=True)
class PromptResult:
    """Decode speeds of one prompt, in tokens per second, and the counts of its turns with speculation.

    Attributes:
        tokens: of the reply.
        steps, proposed, accepted: medians over the turns; they depend on measured times.
    """

    tokens: int
    plain_speed: Spread
    speculative_speed: Spread
    steps: float
    proposed: float
    accepted: float

    @property
    def ratio(self) -> float:
        """Speed with speculation over that without: of the medians."""
        return self.speculative_speed.median / self.plain_speed.median

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per decode step."""
        return (self.tokens - 1) / self.steps

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self) | {"ratio": self.ratio, "mean_accepted_length": self.mean_accepted_length}


@dataclass(frozen=True)
class WorkloadReport:
    """Results of a run, with the facts to repeat it."""

    workload: str
    model: str
    backend: str
    device: str
    decode_tokens: int
    repeats: int
    obstacle: str  # why nothing is proposed, as a clause; "" if it is
    speculation: Speculate  # what proposes: "lookup" or "draft"
    draft: str | None  # the draft model's path
    results: list[PromptResult]
    decode: DecodePath | None = None  # None on the CPU
    random_weights: bool = False
    machine: dict[str, Any] = field(default_factory=machine_record)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def total(self) -> PromptResult:
        """All prompts one after the other: their tokens over the sum of their median times."""

        def speed(speeds: Sequence[Spread]) -> Spread:
            sums = (
                sum(
                    (result.tokens - 1) / getattr(speed, name)
                    for result, speed in zip(self.results, speeds, strict=True)
                )
                for name in ("median", "low", "high")
            )
            middle, low, high = (decoded / seconds for seconds in sums)
            return Spread(middle, low, high, self.repeats)

        decoded = sum(result.tokens - 1 for result in self.results)
        return PromptResult(
            decoded + 1,
            speed([result.plain_speed for result in self.results]),
            speed([result.speculative_speed for result in self.results]),
            sum(result.steps for result in self.results),
            sum(result.proposed for result in self.results),
            sum(result.accepted for result in self.results),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        results = [result.to_dict() for result in self.results]
        return {"format": FORMAT} | asdict(self) | {"results": results, "total": self.total.to_dict()}


def read_workload(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines: ``{"prompt": "...", "chat": false}`` each; `chat` may be left out.

    Raises:
        TextError: the file cannot be read, or is not UTF-8.
        OptionError: a line is no such object, or there is none.
    """
    prompts = []
    for number, line in enumerate(read_text_file(path, "--workload").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = load_json(line)
            text, chat = record["prompt"], record.get("chat", False)
        except (KeyError, TypeError, ValueError, AttributeError, AtomFlowError) as error:
            raise OptionError(
                f'Line {number} of {path} is no JSON object with a "prompt"; write one per line.'
            ) from error
        if not isinstance(text, str) or not text or not isinstance(chat, bool):
            raise OptionError(f'Line {number} of {path}: "prompt" must be a text, and "chat" true or false.')
        prompts.append(Prompt(text, chat))
    if not prompts:
        raise OptionError(f'{path} holds no prompt; write {{"prompt": "..."}} in a line for each.')
    return prompts


def measure_workload(
    engine: Engine,
    path: Path,
    prompts: Sequence[Prompt],
    decode_tokens: int,
    repeats: int,
    progress: Progress | None = None,
) -> WorkloadReport:
    """Measure an engine; its KV cache is overwritten.

    Args:
        engine: with a tokenizer.
        path: of the workload, for the report.
        prompts: its prompts.
        decode_tokens: most tokens of a reply. repeats: turns of each kind.
        progress: called with prompts done and prompts in all.

    Raises:
        OptionError: a number is out of range, a prompt does not fit, or a reply has only one token.
    """
    if decode_tokens < 2 or repeats < 1:
        raise OptionError("A workload needs --decode-tokens of at least 2 and --repeats of at least 1.")
    encoded = [_encoded(engine, prompt) for prompt in prompts]
    results = []
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
        if progress:
            progress(f"prompt {number + 1}", number, len(prompts))
        result = _measure_prompt(engine, prompt, tokens, decode_tokens, repeats)
        if result is None:
            raise OptionError(f"The reply to {quote(prompt.text)} is one token long; leave that prompt out.")
        results.append(result)
    backend = engine.backend
    return WorkloadReport(
        workload=str(path),
        model=str(engine.checkpoint.path),
        backend=backend.name,
        device=backend.device,
        decode_tokens=decode_tokens,
        repeats=repeats,
        obstacle=backend.verification.reason,
        speculation=_speculation(engine),
        draft=None if engine.draft is None else str(engine.draft.checkpoint.path),
        results=results,
        decode=backend.decode_path,
    )


def _speculation(engine: Engine) -> Speculate:
    return "lookup" if engine.draft is None else "draft"


def _encoded(engine: Engine, prompt: Prompt) -> list[int]:
    """A prompt's tokens.

    Raises:
        OptionError: they leave no room for two tokens of a reply.
    """
    text = engine.text
    tokens = text.encode_chat([{"role": "user", "content": prompt.text}]) if prompt.chat else text.encode(prompt.text)
    if len(tokens) >= engine.max_seq_len:
        raise OptionError(
            f"The prompt {quote(prompt.text)} has {len(tokens)} tokens, but the context holds {engine.max_seq_len}; "
            "shorten it."
        )
    return tokens


def _measure_prompt(
    engine: Engine, prompt: Prompt, tokens: Sequence[int], decode_tokens: int, repeats: int
) -> PromptResult | None:
    """The result of one prompt; None if its reply has only one token.

    Raises:
        AtomFlowError: the tokens differ between turns.
    """
    how: Speculate = "auto" if engine.backend.verification.reason else _speculation(engine)
    plain, speculative = (SamplingParams(max_tokens=decode_tokens, speculate=what) for what in ("off", how))
    engine.reset()
    engine.generate_tokens(tokens, SamplingParams(max_tokens=1)).finish()  # later turns find the prompt in the cache
    expected = engine.generate_tokens(tokens, plain).finish().token_ids
    if len(expected) < 2:
        return None
    turns: dict[SamplingParams, list[GenerationStats]] = {plain: [], speculative: []}
    for turn in range(repeats + 1):
        for params in (plain, speculative) if turn % 2 else (speculative, plain):
            reply = engine.generate_tokens(tokens, params).finish()
            if reply.token_ids != expected:
                raise AtomFlowError(
                    f"Two replies to {quote(prompt.text)} differ; report it as an error of this program."
                )
            if turn:  # not the warm-up
                turns[params].append(reply.stats)

    counted = turns[speculative]
    return PromptResult(
        tokens=len(expected),
        plain_speed=Spread.of(stats.tokens_per_second for stats in turns[plain]),
        speculative_speed=Spread.of(stats.tokens_per_second for stats in counted),
        steps=median(stats.steps for stats in counted),
        proposed=median(stats.proposed for stats in counted),
        accepted=median(stats.accepted for stats in counted),
    )
