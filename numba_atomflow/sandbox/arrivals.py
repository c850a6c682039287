"""Workloads: requests from a trace, or arrivals of a Poisson process.

A trace is a file of JSON objects, one per line:

    {"id": 1, "arrival": 0.0, "prompt": "Once upon a time", "max_tokens": 32}
    {"id": 2, "arrival": 0.5, "tokens": [5, 6, 7], "max_tokens": 32}
    {"id": 3, "fork_of": 1, "after": 10, "prompt": " But then", "max_tokens": 32}

The fork continues request 1 as of its 10th generated token. `id` defaults to the number of the line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.errors import OptionError
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.files.untrusted import load_json, short
from numba_atomflow.sandbox.engine import Fork
from numba_atomflow.sandbox.requests import Request

_LATEST = 1e9  # seconds: 30 years
_LARGEST = 2**53  # of ids and numbers of tokens
_FIELDS = {"id", "arrival", "prompt", "tokens", "max_tokens", "fork_of", "after"}


@dataclass
class Workload:
    """Requests with their arrival times, and forks of them."""

    requests: list[Request] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)


def read_trace(
    path: Path, encode: Callable[[str], list[int]] | None, vocabulary: int, end_tokens: frozenset[int] = frozenset()
) -> Workload:
    """The workload of a trace.

    Args:
        encode: text to token ids; None if the model has no tokenizer.
        vocabulary: its size; ids are below it.

    Raises:
        TextError: the file cannot be read.
        OptionError: a line is not a valid request.
    """
    lines = read_text_file(path, "The trace").split("\n")
    workload, seen = Workload(), set[int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = _Line(load_json(line, unique=True), number, encode, vocabulary)
        except (ValueError, TypeError) as error:
            raise _invalid_line(number, path, str(error)) from error
        if entry.id in seen or (entry.parent is not None and entry.parent not in seen):
            fault = f"id {entry.id} is there twice" if entry.id in seen else f"there is no request {entry.parent}"
            raise _invalid_line(number, path, f"{fault} before it")
        seen.add(entry.id)
        if entry.parent is None:
            workload.requests.append(Request(entry.id, entry.tokens, entry.max_tokens, end_tokens, entry.arrival))
        else:
            fork = Fork(entry.id, entry.parent, entry.after, entry.tokens, entry.max_tokens, end_tokens)
            workload.forks.append(fork)
    if not workload.requests:
        raise OptionError(f"The trace {path} has no requests; write one JSON object per line.")
    return workload


def _invalid_line(number: int, path: Path, fault: str) -> OptionError:
    return OptionError(f"Line {number} of the trace {path} is not a valid request ({fault}); correct it.")


class _Line:
    """A line's fields, checked."""

    def __init__(self, record: Any, number: int, encode: Callable[[str], list[int]] | None, vocabulary: int) -> None:
        if not isinstance(record, dict):
            raise TypeError("not a JSON object")
        if unknown := set(record) - _FIELDS:
            raise ValueError(f"unknown field {short(min(unknown))}")
        self.id = _whole_number(record, "id", number, 0)
        self.max_tokens = _whole_number(record, "max_tokens", 32, 1)
        self.after = _whole_number(record, "after", 1, 1)
        self.parent = _whole_number(record, "fork_of", 0, 0) if "fork_of" in record else None
        arrival = record.get("arrival", 0.0)
        if type(arrival) not in (int, float) or not 0.0 <= arrival <= _LATEST:
            raise ValueError("arrival is not a time in seconds")
        self.arrival = float(arrival)
        if ("prompt" in record) == ("tokens" in record):
            raise ValueError("it needs a prompt or tokens")
        if "tokens" in record:
            self.tokens = record["tokens"] if isinstance(record["tokens"], list) else []
        elif encode is None:
            raise ValueError("the model has no tokenizer; give tokens")
        elif not isinstance(record["prompt"], str):
            raise ValueError("prompt must be a text")
        else:
            self.tokens = encode(record["prompt"])
        if not self.tokens or not all(type(token) is int and 0 <= token < vocabulary for token in self.tokens):
            raise ValueError("its tokens are none of the model's, or there are none")


def _whole_number(record: dict[str, Any], name: str, default: int, least: int) -> int:
    value = record.get(name, default)
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{name} must be a whole number, at least {least}")
    return value


def poisson_arrivals(
    rate: float,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_tokens: frozenset[int] = frozenset(),
    seed: int = 0,
) -> Workload:
    """A request per prompt, whose inter-arrival times are exponential with mean 1 / rate seconds.

    Raises:
        OptionError: the rate or the number of tokens is not positive.
    """
    if not 1 / _LATEST <= rate < np.inf:
        raise OptionError(f"The rate of --poisson is {rate}; it must be requests per second, {1 / _LATEST:g} or more.")
    if max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}; it must be 1 or more.")
    times = np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, len(prompts))).tolist()
    return Workload(
        [
            Request(number, prompt, max_tokens, end_tokens, arrival)
            for number, (prompt, arrival) in enumerate(zip(prompts, times, strict=True), 1)
        ]
    )


def random_prompts(count: int, tokens: int, vocabulary: int, common: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens with a common prefix of `common` tokens.

    Raises:
        OptionError: a number is out of range.
    """
    if count < 1 or tokens < 1 or not 0 <= common <= tokens:
        raise OptionError(
            f"{count} prompts of {tokens} tokens with {common} in common cannot be made; "
            "give --requests and --prompt-tokens of at least 1, and --common-tokens up to that."
        )
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocabulary, common).tolist()
    return [[*prefix, *rng.integers(0, vocabulary, tokens - common).tolist()] for _ in range(count)]
