"""Widths: steps of several tokens against decode steps of one, compared bit by bit.

A step that verifies proposed tokens (`Backend.verify`) must give each of them the logits, keys and values of a decode
step; else speculative decoding would change what a model says. The tokens are a prompt's greedy continuation, taken
first one by one, then again in steps of each width. Before each, the keys and values that it has to write are NaN.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Memory
from numba_atomflow.context import Context
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, LmHead, Op
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.utils.arguments import whole_numbers
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.bits import compare_bits

POSITIONS = 64  # that are compared


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Steps of one width.

    Attributes:
        width: tokens of a step; the last step may have fewer.
        elements: of logits, keys and values that were compared.
        different: elements that have other bits than in decode steps.
        position: the first position with one; None if there is none.
        part: what differs there first: ``layer.3.k``, ``layer.3.v`` or ``logits``; None likewise.
    """

    width: int
    elements: int
    different: int = 0
    position: int | None = None
    part: str | None = None

    @property
    def passed(self) -> bool:
        """Every bit is that of decode steps."""
        return self.different == 0


@dataclass(frozen=True)
class WidthsReport:
    """Steps of several widths, compared with decode steps."""

    backend: str
    prompt_tokens: int
    positions: int
    widths: list[WidthResult]

    @property
    def passed(self) -> bool:
        """All widths gave the same bits."""
        return all(result.passed for result in self.widths)

    def verdict(self) -> str:
        """One line."""
        failed = next((result for result in self.widths if not result.passed), None)
        if failed is None:
            widths = ", ".join(str(result.width) for result in self.widths)
            return f"PASS: steps of {widths} tokens have the bits of decode steps at {self.positions} positions."
        return (
            f"FAIL: steps of {failed.width} tokens differ from decode steps, first in {failed.part} at position "
            f"{failed.position} ({failed.different} of {failed.elements} elements)."
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        record = asdict(self)
        for result, entry in zip(self.widths, record["widths"], strict=True):
            entry["passed"] = result.passed
        return record | {"passed": self.passed, "verdict": self.verdict()}


def check_widths(
    backend: Backend,
    geometry: ModelGeometry,
    prompt: Sequence[int],
    widths: Sequence[int] = (1, 2, 4, 8),
    progress: Progress | None = None,
) -> WidthsReport:
    """Compare steps of these widths with decode steps, at the `POSITIONS` positions that follow a prompt.

    Args:
        backend: its KV cache is overwritten.
        geometry: of its model.
        prompt: token ids.
        widths: tokens of a step, each at least 1.
        progress: called with a description, widths done and total widths.

    Raises:
        BackendError: the backend has no steps of such a width.
        OptionError: a width below 1, or an unusable prompt.
        ContextError: prompt and positions do not fit.
    """
    widths = whole_numbers(widths)
    _check(backend, widths)
    cache = [op for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention)]
    context = Context(backend, geometry, cache[0].keys.shape[0])
    ids = context.checked(prompt, used=0)
    context.checked([*ids, *([ids[0]] * POSITIONS)], used=0)
    if progress:
        progress("decode steps", 0, len(widths) + 1)
    context.rewind(0)
    tokens, expected = _decode_steps(context, ids, cache)
    results = []
    for done, width in enumerate(widths, 1):
        if progress:
            progress(f"steps of {width}", done, len(widths) + 1)
        results.append(_compared(width, expected, _wide_steps(backend, len(ids), tokens, width, cache), len(ids)))
    if progress:
        progress("done", len(widths) + 1, len(widths) + 1)
    return WidthsReport(f"{backend.name} ({backend.device})", len(ids), POSITIONS, results)


def _check(backend: Backend, widths: Sequence[int]) -> None:
    if not widths or min(widths) < 1:
        raise OptionError("--widths takes numbers of tokens from 1 on; give for example --widths 1,2,4,8.")
    verification = backend.verification
    if max(widths) > verification.width:
        reason = verification.reason or f"it verifies at most {verification.width} tokens at once"
        raise BackendError(f"Steps of {max(widths)} tokens cannot be checked on {backend.name}, because {reason}.")


class _Bits(NamedTuple):
    """Results at the compared positions.

    Attributes:
        logits: float32 [positions, V].
        cache: keys and values [positions, kv_dim] by name.
    """

    logits: NDArray[np.float32]
    cache: dict[str, NDArray[Any]]


class _LogitsOfStep:
    """An observer that keeps the logits of a decode step."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.float32]] = []

    def before(self, op: Op, memory: Memory) -> None:
        """No effect."""

    def after(self, op: Op, memory: Memory) -> None:
        """Keep the row of logits."""
        if isinstance(op, LmHead):
            self.rows.append(memory.read(op.logits)[0])


def _decode_steps(context: Context, prompt: list[int], cache: Sequence[Attention]) -> tuple[list[int], _Bits]:
    """The greedy continuation of a prompt, one decode step after the other, and its results."""
    backend, logits, tokens = context.backend, _LogitsOfStep(), []
    backend.start(Sampler(SamplingParams(), context.vocabulary, prompt))
    context.prefill(prompt, SAMPLE)
    for _ in range(POSITIONS):
        tokens.append(backend.sampled_tokens()[-1])
        backend.observe(tokens[-1:], SAMPLE, logits)
    return tokens, _Bits(np.stack(logits.rows), _read(backend, len(prompt), cache))


def _wide_steps(backend: Backend, start: int, tokens: list[int], width: int, cache: Sequence[Attention]) -> _Bits:
    """The same tokens again, `width` at a time."""
    with backend.memory() as memory:
        for view in _rows(start, cache).values():
            memory.write(view, np.full(view.shape, np.nan, np.float32))
    logits = []
    for first in range(0, POSITIONS, width):
        backend.seek(start + first)
        logits.append(backend.verify(tokens[first : first + width]).copy())
    return _Bits(np.concatenate(logits), _read(backend, start, cache))


def _rows(start: int, cache: Sequence[Attention]) -> dict[str, View]:
    """Keys and values of the compared positions, by name."""
    views = {}
    for op in cache:
        layer = op.name.removesuffix(".attention")
        views[f"{layer}.k"] = op.keys.rows(start, start + POSITIONS)
        views[f"{layer}.v"] = op.values.rows(start, start + POSITIONS)
    return views


def _read(backend: Backend, start: int, cache: Sequence[Attention]) -> dict[str, NDArray[Any]]:
    with backend.memory() as memory:
        return {name: memory.read(view) for name, view in _rows(start, cache).items()}


def _compared(width: int, expected: _Bits, actual: _Bits, start: int) -> WidthResult:
    """Two runs, bit by bit."""
    parts = [(name, expected.cache[name], rows) for name, rows in actual.cache.items()]
    found = compare_bits([*parts, ("logits", expected.logits, actual.logits)])
    position = None if found.row is None else start + found.row
    return WidthResult(width, found.elements, found.different, position, found.part)
