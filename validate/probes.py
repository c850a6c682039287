"""What is looked at: named probes of a step, and the observer that reads them.

The table of a validation has `layers + 9` probes: the embedding; in the first layer the input norm, q and k after
RoPE, v, the attention output and the MLP output; the output of every layer; the final norm; the logits. The same places
inside the other layers, and the few between (the residual after attention, the MLP's norm and hidden values), are
stages: each op of each layer is followed by at least one, so that a fault can be put down to an op.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Memory, Observer
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Advance, Embed, LmHead, Op, Qkv, Sample

Rows = NDArray[np.float32]  # [positions, width]


@dataclass(frozen=True, slots=True)
class Probe:
    """One place in the step.

    Attributes:
        name: of its tensor in a ground truth.
        op: the op that has just run when it is read.
        field: the op's view that holds it.
        width: values per position.
        layer: that it is in, or None.
        in_table: a probe of the table; otherwise a stage.
    """

    name: str
    op: str
    field: str
    width: int
    layer: int | None
    in_table: bool


def all_probes(geometry: ModelGeometry) -> list[Probe]:
    """Probes and stages, in the order of the step."""
    g = geometry
    probes = [Probe("embedding", "embed", "residual", g.hidden, None, True)]
    for i in range(g.layers):
        first = i == 0

        def inside(name: str, op: str, field: str, width: int, in_table: bool, i: int = i) -> Probe:
            return Probe(f"layer.{i}.{name}", f"layer.{i}.{op}", field, width, i, in_table)

        probes += [
            inside("input_norm", "qkv", "x_norm", g.hidden, first),
            inside("q", "qkv", "q", g.q_dim, first),
            inside("k", "qkv", "keys", g.kv_dim, first),
            inside("v", "qkv", "values", g.kv_dim, first),
            inside("attention", "attention", "attn_out", g.q_dim, first),
            inside("after_attention", "o", "residual", g.hidden, False),
            inside("ffn_norm", "gate_up", "x_norm", g.hidden, False),
            inside("ffn", "gate_up", "y", g.ffn, False),
            *([inside("mlp", "down", "residual", g.hidden, True)] if first else []),  # what `down` adds to it
            inside("output", "down", "residual", g.hidden, True),
        ]
    probes += [
        Probe("final_norm", "lm_head", "x_norm", g.hidden, None, True),
        Probe("logits", "lm_head", "logits", g.vocabulary, None, True),
    ]
    return probes


def layer_input(layer: int) -> str:
    """The probe that holds what goes into a layer (`layers` itself: into the final norm)."""
    return f"layer.{layer - 1}.output" if layer else "embedding"


class Prober:
    """An observer that hands every probe's rows to `sink`, and may feed each layer a reference's input.

    Args:
        probes: what to read.
        sink: called with the probe, the position of its first row, and its rows [n, width] as float32.
        advanced: called after each step with the position that the step should have left behind, and the one it left.
        feed: called with the name of a probe, a position and a number of rows; what it returns is written into the
            residual stream where a layer (or the final norm) takes it from. None leaves the stream alone.
        others: observers that come after the feeding and before the reading.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        sink: Callable[[Probe, int, Rows], None],
        advanced: Callable[[int, int], None] | None = None,
        feed: Callable[[str, int, int], Rows] | None = None,
        others: Sequence[Observer] = (),
    ) -> None:
        self._of_op: dict[str, list[Probe]] = {}
        for probe in probes:
            self._of_op.setdefault(probe.op, []).append(probe)
        self._sink, self._advanced, self._feed, self._others = sink, advanced, feed, others
        self._layers = 1 + max((probe.layer for probe in probes if probe.layer is not None), default=-1)
        self._position = 0  # of the step's first token, whatever the device believes
        self._residual: View | None = None  # all rows of the step
        self._before: NDArray[Any] | None = None  # the residual before a `down` whose addition is wanted

    def begin(self, position: int) -> None:
        """The next step's first token is at `position`."""
        self._position = position

    def before(self, op: Op, memory: Memory) -> None:
        """Feed the op, if it is the first of a layer; keep a sampler from NaN."""
        if isinstance(op, Embed):
            self._residual = op.residual
        if self._feed is not None and isinstance(op, Qkv | LmHead):
            layer = int(op.name.split(".")[1]) if isinstance(op, Qkv) else self._layers
            first, count = self._first_position(op.residual), op.residual.shape[0]
            memory.write(op.residual, self._feed(layer_input(layer), first, count))
        if isinstance(op, Sample) and not np.isfinite(memory.read(op.logits)).all():
            # They have been compared; a sampler would refuse them, and its token is not used.
            memory.write(op.logits, np.zeros(op.logits.shape, np.float32))
        for other in self._others:
            other.before(op, memory)
        if any(probe.name.endswith(".mlp") for probe in self._of_op.get(op.name, ())):
            self._before = memory.read(op.writes[0])

    def after(self, op: Op, memory: Memory) -> None:
        """Read the op's probes."""
        for other in self._others:
            other.after(op, memory)
        for probe in self._of_op.get(op.name, ()):
            view: View = getattr(op, probe.field)
            first = self._position
            if probe.field in {"keys", "values"}:  # all that is in the cache: a stray write may have spoilt older rows
                view, first = view.rows(0, first + op.writes[0].shape[0]), 0
            elif isinstance(op, LmHead):
                first = self._first_position(op.residual)
            rows = memory.read(view).astype(np.float32)
            if probe.name.endswith(".mlp") and self._before is not None:
                rows -= self._before
            self._sink(probe, first, rows)
        if isinstance(op, Advance) and self._advanced is not None:
            self._advanced(self._position + op.tokens, int(memory.read(op.position)[0]))

    def _first_position(self, rows: View) -> int:
        """The position of the first of some rows of the residual stream; a head may take only the last ones."""
        if self._residual is None:
            raise RuntimeError("a step must begin with its embedding")
        return self._position + (rows.address - self._residual.address) // self._residual.strides[0]
