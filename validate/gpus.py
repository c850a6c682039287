"""Several GPUs that share a model against one: the same decode steps, compared bit by bit.

Every sum is computed by one GPU, in the order of one GPU (docs/many-gpus.md): keys, values, logits and tokens must have
the same bits. Both run a prompt and its greedy continuation in decode steps; then the continuation once more as a
generation does, with steps that are queued ahead.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.context import Context
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import SAMPLE, Attention, LmHead
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.utils.arguments import whole_number
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.bits import compare_bits


class StepBits(NamedTuple):
    """Results of decode steps.

    Attributes:
        device: that ran them.
        prompt_tokens: of all positions.
        parts: [positions, ...] by name, in the order in which a step makes them: ``layer.3.k``, ``layer.3.v``,
            ``logits``, ``tokens`` (the most likely ones) and ``reply`` (those of the generation, and 0 before).
    """

    device: str
    prompt_tokens: int
    parts: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class GpusReport:
    """Several GPUs, compared with one.

    Attributes:
        backend, reference: the several, and the one.
        elements: of all parts. different: that have other bits.
        position: the first one with such an element; None if there is none.
        part: what differs there first, as in `StepBits`; None likewise.
    """

    backend: str
    reference: str
    prompt_tokens: int
    positions: int
    elements: int
    different: int
    position: int | None
    part: str | None

    @property
    def passed(self) -> bool:
        """Every bit is that of one GPU."""
        return self.different == 0

    def verdict(self) -> str:
        """One line."""
        if self.passed:
            return f"PASS: keys, values, logits and tokens have the bits of one GPU at {self.positions} positions."
        return (
            f"FAIL: they differ from one GPU, first in {self.part} at position {self.position} "
            f"({self.different} of {self.elements} elements)."
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self) | {"passed": self.passed, "verdict": self.verdict()}


def record_steps(
    backend: Backend,
    geometry: ModelGeometry,
    prompt: Sequence[int],
    decode_steps: int = 32,
    progress: Progress | None = None,
) -> StepBits:
    """Run a prompt and its greedy continuation in decode steps, and keep every result.

    Memory: 4 bytes for each logit of each position, and all keys and values; 2 GB for 4,096 positions of a vocabulary
    of 128,256.

    Args:
        backend: its KV cache is overwritten. One GPU must run decode steps in the persistent kernel.
        geometry: of its model.
        prompt: token ids.
        decode_steps: tokens after the prompt.
        progress: called with a description, positions done and all positions.

    Raises:
        OptionError: an unusable prompt, or number of steps.
        ContextError: prompt and steps do not fit.
        MemoryError: there is too little for the logits.
    """
    decode_steps = whole_number("decode_steps", decode_steps)
    if decode_steps < 0:
        raise OptionError(f"decode_steps is {quote(decode_steps)}; it must be 0 or more.")
    ops = backend.step(1, SAMPLE)
    cache = [op for op in ops if isinstance(op, Attention)]
    (head,) = (op for op in ops if isinstance(op, LmHead))
    context = Context(backend, geometry, cache[0].keys.shape[0])
    tokens = context.checked(prompt, used=0)
    count, positions = len(tokens), len(tokens) + decode_steps
    if positions > context.max_seq_len:
        raise ContextError(
            f"{count} tokens of the prompt and {quote(decode_steps)} decode steps do not fit into the context, which "
            f"holds {context.max_seq_len}; ask for fewer."
        )
    context.rewind(0)
    backend.start(Sampler(SamplingParams(), context.vocabulary, tokens))
    logits, chosen = np.empty((positions, context.vocabulary), np.float32), list[int]()
    for position in range(positions):
        if progress:
            progress("decode steps", position, positions)
        context.prefill(tokens[position : position + 1], SAMPLE)
        chosen.append(backend.sampled_tokens()[-1])
        tokens += chosen[-1:] if position + 1 >= count else []
        with backend.memory() as memory:
            logits[position] = memory.read(head.logits)[0]
    parts: dict[str, NDArray[Any]] = {}
    with backend.memory() as memory:
        for op in cache:
            layer = op.name.removesuffix(".attention")
            parts[f"{layer}.k"] = memory.read(op.keys.rows(0, positions))
            parts[f"{layer}.v"] = memory.read(op.values.rows(0, positions))
    parts["logits"] = logits
    reply = _generate(context, tokens[:count], decode_steps)
    parts["tokens"], parts["reply"] = (np.array(row, np.int64)[:, None] for row in (chosen, [0] * (count - 1) + reply))
    return StepBits(f"{backend.name} ({backend.device})", count, parts)


def _generate(context: Context, prompt: list[int], decode_steps: int) -> list[int]:
    """The continuation [decode_steps + 1], by steps that are queued ahead, after the prompt's last token."""
    backend = context.backend
    context.rewind(len(prompt) - 1)
    context.prefill(prompt[-1:], SAMPLE)
    reply = [backend.sampled_tokens()[-1]]
    for _ in range(decode_steps):
        context.decode(reply[-1])
        reply.append(backend.sampled_tokens()[-1])
    return reply


def compare_gpus(one: StepBits, several: StepBits) -> GpusReport:
    """Compare the steps of several GPUs with those of one, of the same prompt and number of steps."""
    found = compare_bits((name, rows, several.parts[name]) for name, rows in one.parts.items())
    positions = len(one.parts["tokens"])
    return GpusReport(
        several.device,
        one.device,
        one.prompt_tokens,
        positions,
        found.elements,
        found.different,
        found.row,
        found.part,
    )
