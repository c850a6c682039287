"""The task of every peer, and its answer.

A peer is a script that runs in a process of its own, so that its GPU memory is freed at its end. Its only argument is a
`Task` as JSON; the last line of its standard output is an `Answer` as JSON. The task is the same for all: a prompt of P
tokens, then N decode steps, greedy; `repeats` turns, after a discarded warm-up.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from numba_atomflow.geometry import ModelGeometry


@dataclass(frozen=True)
class Task:
    """The work of a peer.

    Attributes:
        device: "auto" (a GPU if there is one) or "cpu".
        threads: on the CPU; None: each engine's own choice.
        options: of one peer alone.
    """

    geometry: ModelGeometry
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    device: str = "auto"
    threads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Prompt and reply."""
        return self.prompt_tokens + self.decode_tokens + 1

    def prompt(self) -> list[int]:
        """The same tokens for all peers."""
        tokens: list[int] = np.random.default_rng(0).integers(0, self.geometry.vocabulary, self.prompt_tokens).tolist()
        return tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        record = json.loads(text)
        return cls(**record | {"geometry": ModelGeometry.from_dict(record["geometry"])})


@dataclass(frozen=True)
class Answer:
    """What a peer measured.

    Attributes:
        what: version, types, settings.
        ttft: seconds from the prompt to the first token, per turn.
        tpot: mean seconds per token after it, per turn.
        memory: most bytes of main memory that the engine's process held, mapped files included; None: not known.
    """

    what: str
    ttft: list[float]
    tpot: list[float]
    memory: int | None = None


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    """Most bytes of main memory that this process, or its largest child (RUSAGE_CHILDREN), has held."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(who).ru_maxrss * unit


def answer(measure: Callable[[Task], Answer]) -> None:
    """Read the task, print the answer."""
    print(json.dumps(asdict(measure(Task.from_json(sys.argv[1])))))
