"""What a batch does with each row: generate text, measure perplexity, or validate.

A task is plain data that travels to the processes that run it, and is stored with the results.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from numba_atomflow.backends.base import Decode, Prefill
from numba_atomflow.backends.choose import BackendName
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.engine import Engine
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sampling import SamplingParams

CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


class Task(Protocol):
    """What is done with the rows of a batch."""

    def prepare(self, row: Mapping[str, Any]) -> str:
        """Check a row as far as that is possible without a model.

        Returns:
            what its prompt begins with, as text: rows that share a prefix share one here.

        Raises:
            AtomFlowError: a field is missing, unknown, or has a wrong value.
        """

    def run(self, engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
        """The result of a row, JSON-ready.

        Raises:
            AtomFlowError: the model cannot take the row.
        """

    def to_dict(self) -> dict[str, Any]:
        """What the results depend on, besides rows and model."""


@dataclass(frozen=True)
class EngineOptions:
    """How each process loads the model; the arguments of `Engine.load`. `threads` are those of one process on a CPU."""

    backend: BackendName = "auto"
    max_seq_len: int | None = None
    threads: int | None = None
    decode: Decode = "auto"
    prefill: Prefill = "auto"
    prefill_chunk: int | None = None
    private_copy: bool = False


@dataclass(frozen=True)
class GenerateTask:
    """A reply for each row.

    A row has `prompt` (a text or token ids) or `messages`. It may have `params` (fields of `SamplingParams`, in place
    of those of the task), `constraint` (`{"json_schema": ...}`, or regex, grammar or choice) and, for messages,
    `template_variables`.

    Attributes:
        params: fields of `SamplingParams` for rows that do not give them.
    """

    params: Mapping[str, Any]

    def prepare(self, row: Mapping[str, Any]) -> str:
        _check_fields(row, ("prompt", "messages", "params", "constraint", "template_variables"))
        if ("prompt" in row) == ("messages" in row):
            raise OptionError("The row has no prompt, or two; give `prompt` or `messages`.")
        self._sampling(row)
        variables = _mapping(row, "template_variables")
        if "messages" in row:
            return f"messages {sorted(variables.items())} {row['messages']}"
        if variables:
            raise OptionError("template_variables are for `messages`; leave them out.")
        prompt = row["prompt"]
        if isinstance(prompt, list):
            return f"tokens {prompt}"
        if not isinstance(prompt, str):
            raise OptionError(f"prompt is {quote(prompt)}; it must be a text, or a list of token ids.")
        return f"text {prompt}"

    def run(self, engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
        params = SamplingParams(**self._sampling(row), constraint=_constraint(row))
        if "messages" in row:
            variables = _mapping(row, "template_variables")
            generation = engine.chat(row["messages"], params, template_variables=variables)
        else:
            generation = engine.generate(row["prompt"], params)
        text, stats = generation.finish().text, generation.stats
        result: dict[str, Any] = {
            "text": text,
            "finish_reason": generation.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "tokens": stats.tokens,
        }
        if params.logprobs is not None:
            result["logprobs"] = [item._asdict() for item in generation.logprobs]
        if params.prompt_logprobs is not None:
            result["prompt_logprobs"] = [item and item._asdict() for item in generation.prompt_logprobs]
        return result

    def to_dict(self) -> dict[str, Any]:
        return {"task": "generate", "params": dict(self.params)}

    def _sampling(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's fields of `SamplingParams`.

        Raises:
            OptionError: one is unknown, or out of range; or the constraint is none.
        """
        values = {**self.params, **_mapping(row, "params")}
        names = [field.name for field in fields(SamplingParams) if field.name != "constraint"]
        for name in values:
            if name not in names:
                raise OptionError(f"params has no field {quote(name)}; its fields are {', '.join(names)}.")
        SamplingParams(**values)
        constraint = _mapping(row, "constraint")
        if constraint and (len(constraint) != 1 or next(iter(constraint)) not in CONSTRAINTS):
            raise OptionError(f"constraint is {quote(constraint)}; give one of {', '.join(CONSTRAINTS)}.")
        return values


@dataclass(frozen=True)
class PerplexityTask:
    """The perplexity of each row's `text`. The attributes are those of `numba-atomflow perplexity`."""

    context: int | None = None
    stride: int | None = None

    def prepare(self, row: Mapping[str, Any]) -> str:
        _check_fields(row, ("text",))
        return _text(row, "text")

    def run(self, engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
        from numba_atomflow.perf.perplexity import measure

        found = measure(engine, row["text"], self.context, self.stride)
        nats = math.log(found.perplexity) * found.tokens  # of the whole text
        return {
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens,
            "nats": nats if math.isfinite(nats) else None,
        }

    def to_dict(self) -> dict[str, Any]:
        return {"task": "perplexity", **asdict(self)}


@dataclass(frozen=True)
class ValidateTask:
    """Every layer on each row's `prompt`, compared with transformers on the same dequantized weights.

    Attributes:
        decode_steps: tokens after the prompt.
    """

    decode_steps: int = 32

    def prepare(self, row: Mapping[str, Any]) -> str:
        _check_fields(row, ("prompt",))
        return _text(row, "prompt")

    def run(self, engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
        from numba_atomflow.validate import check, make_ground_truth

        with Checkpoint.open(engine.checkpoint.path) as checkpoint:
            truth = make_ground_truth(checkpoint, row["prompt"], self.decode_steps)
        report = check(engine.backend, truth)
        return {
            "passed": report.passed,
            "verdict": report.verdict(),
            "prompt_tokens": report.prompt_tokens,
            "agreed": report.logits.agreed if report.logits else None,
            "positions": report.logits.positions if report.logits else None,
            "mean_kl": report.logits.mean_kl if report.logits else None,
        }

    def to_dict(self) -> dict[str, Any]:
        return {"task": "validate", **asdict(self)}


def _check_fields(row: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in row:
        if name not in known:
            raise OptionError(f"The row has an unknown field {quote(name)}; its fields are id, {', '.join(known)}.")


def _mapping(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = row.get(name)
    if value is not None and not isinstance(value, dict):
        raise OptionError(f"{name} is {quote(value)}; it must be a JSON object.")
    return value or {}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {quote(value)}; it must be a text.")
    return value


def _constraint(row: Mapping[str, Any]) -> Any:
    if not row.get("constraint"):
        return None
    from numba_atomflow.constraints import Choice, Grammar, JsonSchema, Regex

    kinds: dict[str, Callable[[Any], Any]] = dict(zip(CONSTRAINTS, (JsonSchema, Regex, Grammar, Choice), strict=True))
    ((kind, value),) = row["constraint"].items()
    return kinds[kind](value)
