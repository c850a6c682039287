"""The task of every peer, and its answer.

A peer is a script that runs in a process of its own, so that its GPU memory is freed at its end. Its only argument is a
`Task` as JSON; the last line of its standard output is an `Answer` as JSON. The task is the same for all: a prompt of P
tokens, then N decode steps, greedy; `repeats` turns, after a discarded warm-up.
"""

import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

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
        private: of them, those that are not of mapped files. Pages of files (weights, programs) are the system's to
            take back, and all processes share them.
    """

    what: str
    ttft: list[float]
    tpot: list[float]
    memory: int | None = None
    private: int | None = None


def peak_memory() -> int:
    """Most bytes of main memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """The most main memory of a process while a block runs, by looking every 50 ms (Linux; elsewhere nothing is known).

    Args:
        process: its id; by default this process.

    Attributes:
        total, private: bytes, as in `Answer`; None: not known.
    """

    def __init__(self, process: int | None = None) -> None:
        self._status = Path(f"/proc/{process or os.getpid()}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.total: int | None = None
        self.private: int | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._look()

    def _look(self) -> None:
        with suppress(OSError, KeyError):  # another system, or the process has ended
            lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
            total, private = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "RssAnon"))
            if total > (self.total or 0):
                self.total, self.private = total, private


def answer(measure: Callable[[Task], Answer]) -> None:
    """Read the task, print the answer."""
    print(json.dumps(asdict(measure(Task.from_json(sys.argv[1])))))
