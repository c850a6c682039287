"""Replay: the same prompt and greedy continuation several times, compared bit by bit.

The runs are those of a generation, not of an observer: on a GPU, captured graphs or the persistent kernel. A kernel
that adds in an order of chance, or reads what another has not yet written, gives other bits from run to run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.context import Context
from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.utils.progress import Progress

Bits = dict[str, NDArray[Any]]  # [positions, ...] by name, in the order in which a step makes them


@dataclass(frozen=True, slots=True)
class ReplayedPart:
    """One result of a run: keys or values of a layer, the tokens, or the logits after the last of them.

    Attributes:
        name: ``layer.3.k``, ``layer.3.v``, ``tokens`` or ``logits``.
        elements: that were compared in each run.
        different: most elements that had other bits than in the first run.
        position: the first position with one; None if there is none.
        run: in which this was, from 2 on; None likewise.
    """

    name: str
    elements: int
    different: int = 0
    position: int | None = None
    run: int | None = None


@dataclass(frozen=True)
class ReplayReport:
    """Runs of the same tokens, compared with the first."""

    backend: str
    prompt_tokens: int
    decode_steps: int
    runs: int
    parts: list[ReplayedPart]

    @property
    def passed(self) -> bool:
        """All runs gave the same bits."""
        return not any(part.different for part in self.parts)

    @property
    def first(self) -> ReplayedPart | None:
        """The first part that differs: at the earliest position, there in the earliest layer."""
        different = [part for part in self.parts if part.position is not None]
        return min(different, key=lambda part: part.position or 0, default=None)

    def verdict(self) -> str:
        """One line."""
        if self.first is None:
            return f"PASS: {self.runs} runs gave the same bits."
        part = self.first
        return (
            f"FAIL: run {part.run} differs from run 1, first in {part.name} at position {part.position} "
            f"({part.different} of {part.elements} elements of {part.name})."
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self) | {"passed": self.passed, "verdict": self.verdict()}


def replay(
    backend: Backend,
    geometry: ModelGeometry,
    prompt: Sequence[int],
    decode_steps: int = 32,
    runs: int = 2,
    progress: Progress | None = None,
) -> ReplayReport:
    """Run a prompt and its greedy continuation several times, and compare every bit with the first run.

    Compared are the KV cache of every layer, the tokens, and the logits of the last position.

    Args:
        backend: its KV cache is overwritten.
        geometry: of its model.
        prompt: token ids.
        decode_steps: tokens after the prompt.
        runs: at least 2.
        progress: called with a description, runs done and total runs.

    Raises:
        OptionError: fewer runs, or an unusable prompt.
        ContextError: prompt and steps do not fit.
    """
    if runs < 2:
        raise OptionError(f"--replay is {runs}; it takes at least 2 runs to compare.")
    positions = next(op.keys.shape[0] for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention))
    context = Context(backend, geometry, positions)
    ids = context.checked(prompt, used=0)
    context.checked([*ids, *([ids[0]] * decode_steps)], used=0)
    first: Bits = {}
    parts: dict[str, ReplayedPart] = {}
    for run in range(1, runs + 1):
        if progress:
            progress("replay", run - 1, runs)
        bits = _run(context, ids, decode_steps)
        if run == 1:
            first, parts = bits, {name: ReplayedPart(name, rows.size) for name, rows in bits.items()}
            continue
        for name, rows in bits.items():
            part = _compared(name, first[name], rows, run, len(ids) + decode_steps - 1)
            if part.different > parts[name].different:
                parts[name] = part
    if progress:
        progress("done", runs, runs)
    device = f"{backend.name} ({backend.device})"
    return ReplayReport(device, len(ids), decode_steps, runs, list(parts.values()))


def _run(context: Context, prompt: list[int], decode_steps: int) -> Bits:
    """One run from an empty KV cache."""
    backend = context.backend
    context.rewind(0)
    backend.start(Sampler(SamplingParams(), context.vocabulary, prompt))
    context.prefill(prompt, SAMPLE)
    for _ in range(decode_steps):
        context.decode(backend.sampled_tokens()[-1])
    backend.sampled_tokens()
    positions = len(context.token_ids)
    bits: Bits = {}
    with backend.memory() as memory:
        for op in backend.step(1, NO_LOGITS):
            if isinstance(op, Attention):
                layer = op.name.removesuffix(".attention")
                bits[f"{layer}.k"] = memory.read(op.keys.rows(0, positions))
                bits[f"{layer}.v"] = memory.read(op.values.rows(0, positions))
    tokens = list(context.token_ids)
    context.rewind(positions - 1)
    bits["logits"] = context.feed(tokens[-1:])[None]
    bits["tokens"] = np.array(tokens, np.int64)[:, None]
    return bits


def _compared(name: str, first: NDArray[Any], rows: NDArray[Any], run: int, last: int) -> ReplayedPart:
    """Two runs' rows, bit by bit: NaN equals NaN, and 0 is not -0."""
    unsigned = np.dtype(f"u{rows.dtype.itemsize}")
    different = np.ascontiguousarray(first).view(unsigned) != np.ascontiguousarray(rows).view(unsigned)
    if not different.any():
        return ReplayedPart(name, rows.size)
    row = int(np.flatnonzero(different.any(axis=1))[0])
    return ReplayedPart(name, rows.size, int(different.sum()), last if name == "logits" else row, run)
