"""What a constraint costs per token: CPU time of masks, of accepting tokens, and of listing the allowed ones.

    python scripts/mask_cost.py                                 # the demo model
    python scripts/mask_cost.py my-model.safetensors --json

Replies of the model under a JSON schema, one greedy and the others at temperature 1. What is measured is CPU time of
one thread, so that other programs matter little.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow import AtomFlowError, Engine, SamplingParams
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.constraints import ConstraintState, JsonSchema
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.sampling import tokens_of
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.utils.json_text import json_text


def strict(properties: dict[str, Any]) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


CITY = strict({"name": {"type": "string"}, "kind": {"enum": ["home", "work"]}})
PERSON = strict({"name": {"type": "string"}, "age": {"type": "integer"}, "married": {"type": "boolean"}, "city": CITY})


class Timed:
    """A constraint and its state, with the CPU seconds of every call."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._constraint = JsonSchema(schema)
        self.seconds: dict[str, list[float]] = {"compile": [], "mask": [], "list": [], "accept": []}

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = call()
        self.seconds[what].append(time.thread_time() - started)
        return result

    def start(self, tokens: TokenTable) -> ConstraintState:
        self._vocabulary = tokens.vocabulary
        self._state: ConstraintState = self._timed("compile", lambda: self._constraint.start(tokens))
        return self

    def allowed(self) -> NDArray[np.uint32] | None:
        mask = self._timed("mask", self._state.allowed)
        self._timed("list", lambda: tokens_of(mask, self._vocabulary))
        return mask  # type: ignore[no-any-return]

    def accept(self, token: int) -> None:
        self._timed("accept", lambda: self._state.accept(token))

    def is_complete(self) -> bool:
        return self._state.is_complete()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table or JSON; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        with Engine.load(given.model, backend="cpu", max_seq_len=512, threads=given.threads) as engine:
            calls = _seconds_of_calls(engine, given.replies)
            vocabulary = engine.geometry.vocabulary
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json_text({"machine": machine_record(), "commit": commit(), "vocabulary": vocabulary, "seconds": calls}))
        return 0
    print(f"{len(calls['mask'])} tokens, vocabulary {vocabulary}")
    for what, seconds in calls.items():
        mean, median, worst = (1e6 * float(f(seconds)) for f in (np.mean, np.median, np.max))
        print(f"{what:8} mean {mean:6.0f} us, median {median:6.0f}, largest {worst:6.0f}")
    return 0


def _seconds_of_calls(engine: Engine, replies: int) -> dict[str, list[float]]:
    """CPU seconds of every call, by what is called."""
    message = [{"role": "user", "content": "Describe a person as JSON."}]
    first = SamplingParams(max_tokens=1, constraint=JsonSchema(PERSON))  # makes the index of the vocabulary
    engine.chat(message, first).finish()
    timed = Timed(PERSON)
    for seed in range(1, replies + 1):
        params = SamplingParams(float(seed > 1), seed=seed, max_tokens=150, constraint=timed)
        engine.chat(message, params).finish()
    return timed.seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--replies", type=_count, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print a record")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of replies; there must be at least one")
    return number


if __name__ == "__main__":
    sys.exit(main())
