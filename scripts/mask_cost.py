"""What a constraint costs per token: CPU time of masks, of accepting tokens, and of listing the allowed ones.

    python scripts/mask_cost.py                                 # the demo model
    python scripts/mask_cost.py --replies 500 --temperature 1.5 # whether the schema is ever violated, too
    python scripts/mask_cost.py my-model.safetensors --json

Replies of the model under a JSON schema, one greedy and the others sampled. What is measured is CPU time of one thread,
so that other programs matter little. Every reply is checked with the package jsonschema.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from number_lists import at_least
from numpy.typing import NDArray

from numba_atomflow import AtomFlowError, Engine, Generation, SamplingParams
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
MOST_TOKENS = 150  # of a reply
PERSON = strict({"name": {"type": "string"}, "age": {"type": "integer"}, "married": {"type": "boolean"}, "city": CITY})


@dataclass
class Replies:
    """How many replies there were of each kind.

    Attributes:
        valid: complete, and the schema accepts them. violating: complete, and it does not.
        cut: ended by the limit of tokens.
    """

    valid: int = 0
    violating: int = 0
    cut: int = 0

    def count(self, reply: Generation) -> None:
        """Judge a finished reply."""
        if reply.finish_reason == "max_tokens":
            self.cut += 1
        elif satisfies(reply.text, PERSON):
            self.valid += 1
        else:
            self.violating += 1


def satisfies(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that the schema accepts, by another implementation than the one that made the masks."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


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
    parser = _parser()
    given = parser.parse_args(arguments)
    if find_spec("jsonschema") is None:
        parser.error("Replies are checked with the package jsonschema; install it by pip install jsonschema.")
    try:
        with Engine.load(given.model, backend="cpu", max_seq_len=512, threads=given.threads) as engine:
            calls, replies = _measure(engine, given.replies, given.temperature)
            vocabulary = engine.geometry.vocabulary
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        record = {"machine": machine_record(), "commit": commit(), "vocabulary": vocabulary, "replies": asdict(replies)}
        print(json_text(record | {"seconds": calls}))
        return 0
    print(f"{len(calls['mask'])} tokens, vocabulary {vocabulary}")
    for what, seconds in calls.items():
        mean, median, worst = (1e6 * float(f(seconds)) for f in (np.mean, np.median, np.max))
        print(f"{what:8} mean {mean:6.0f} us, median {median:6.0f}, largest {worst:6.0f}")
    print(
        f"replies  {given.replies}: {replies.valid} satisfy the schema, {replies.violating} violate it, "
        f"{replies.cut} were cut off at {MOST_TOKENS} tokens"
    )
    return 0


def _measure(engine: Engine, count: int, temperature: float) -> tuple[dict[str, list[float]], Replies]:
    """CPU seconds of every call, by what is called; and what the replies were."""
    message = [{"role": "user", "content": "Describe a person as JSON."}]
    first = SamplingParams(max_tokens=1, constraint=JsonSchema(PERSON))  # makes the index of the vocabulary
    engine.chat(message, first).finish()
    timed, replies = Timed(PERSON), Replies()
    for seed in range(1, count + 1):
        params = SamplingParams(temperature * (seed > 1), seed=seed, max_tokens=MOST_TOKENS, constraint=timed)
        replies.count(engine.chat(message, params).finish())
    return timed.seconds, replies


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--replies", type=at_least(1), default=10)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print a record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
