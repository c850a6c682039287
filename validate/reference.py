"""References: the values of every probe at every position, from transformers or another backend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from numba_atomflow.backends.base import Backend
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.precision import Precision
from numba_atomflow.validate.probes import Probe, Prober, Rows, all_probes
from numba_atomflow.validate.walk import walk


@dataclass(frozen=True)
class Reference:
    """Tokens, and the probes of a reference implementation on them.

    Attributes:
        label: the implementation, for reports.
        geometry: of the model.
        tokens: ids of the prompt, then of the decode steps: one per position.
        prompt_tokens: how many of them are the prompt.
        precision: of its values.
        tensors: float32 [positions, width] by probe name.
        metadata: of a ground-truth file.
        check_unchanged: raises if `tensors` are views of a file that another program has modified.
    """

    label: str
    geometry: ModelGeometry
    tokens: tuple[int, ...]
    prompt_tokens: int
    precision: Precision
    tensors: Mapping[str, Rows]
    metadata: Mapping[str, str] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None

    def rows(self, name: str, start: int, count: int) -> Rows:
        """Rows start .. start + count - 1 of a probe."""
        return self.tensors[name][start : start + count]


def record(
    backend: Backend,
    geometry: ModelGeometry,
    prompt: Sequence[int],
    decode_steps: int = 32,
    block: int | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Run a backend on a prompt and its greedy continuation, and record every probe.

    Args:
        backend: with a KV cache of at least len(prompt) + decode_steps positions.
        geometry: of its model.
        prompt: token ids.
        decode_steps: tokens after the prompt.
        block: tokens per step of the prompt; the backend's own if None, 1 to take it as decode steps.
        progress: called with a description, tokens done and total tokens.
    """
    positions = len(prompt) + decode_steps
    tensors = {probe.name: np.full((positions, probe.width), np.nan, np.float32) for probe in all_probes(geometry)}

    def keep(probe: Probe, start: int, rows: Rows) -> None:
        tensors[probe.name][start : start + len(rows)] = rows

    prober = Prober(all_probes(geometry), keep)
    tokens = list(prompt)
    walk(backend, tokens, len(prompt), prober, block, progress)
    for position in range(len(prompt), positions):
        if progress:
            progress("decode", position, positions)
        tokens.append(int(tensors["logits"][position - 1].argmax()))
        prober.begin(position)
        backend.observe(tokens[-1:], SAMPLE, prober)
    return Reference(
        label=f"{backend.name} backend" + (", token by token" if block == 1 else ""),
        geometry=geometry,
        tokens=tuple(tokens),
        prompt_tokens=len(prompt),
        precision=Precision.of_ops(backend.step(1, SAMPLE)),
        tensors=tensors,
    )
