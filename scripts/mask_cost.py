"""What a constraint costs per token: CPU time of masks, of accepting tokens, and of listing the allowed ones.

    python scripts/mask_cost.py MODEL

Replies of the model under a JSON schema, one greedy and the others at temperature 1. What is measured is CPU time of
one thread, so that other programs matter little.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.constraints import ConstraintState, JsonSchema
from numba_atomflow.sampling import tokens_of
from numba_atomflow.text.token_table import TokenTable

REPLIES = 10


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


def main() -> None:
    timed = Timed(PERSON)
    message = [{"role": "user", "content": "Describe a person as JSON."}]
    with Engine.load(sys.argv[1], backend="cpu", max_seq_len=512) as engine:
        for seed in range(REPLIES + 1):  # the first one makes the index of the vocabulary
            if seed == 1:
                timed = Timed(PERSON)
            params = SamplingParams(float(seed > 1), seed=seed, max_tokens=150, constraint=timed)
            engine.chat(message, params).finish()
        print(f"{len(timed.seconds['mask'])} tokens, vocabulary {engine.geometry.vocabulary}")
    for what, seconds in timed.seconds.items():
        mean, median, worst = (1e6 * float(f(seconds)) for f in (np.mean, np.median, np.max))
        print(f"{what:8} mean {mean:6.0f} us, median {median:6.0f}, largest {worst:6.0f}")


if __name__ == "__main__":
    main()
