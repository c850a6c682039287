"""Probes: named intermediate values of a step, and the observer that reads them.

The table of a validation has `layers + 9` probes: the embedding; in the first layer the input norm, q and k after RoPE,
v, the attention output and the MLP output; the output of every layer; the final norm; the logits. Stages are the other
intermediate values: the same ones of later layers, the residual after attention, the norm and intermediate of the MLP.
Every op of every layer has at least one probe or stage, so that a fault is attributed to an op.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Memory, Observer
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.model.activations import activations
from numba_atomflow.model.step import Advance, Attention, Embed, LmHead, Op, Sample
from numba_atomflow.validate.isolation import Isolation, fed_views

Rows = NDArray[np.float32]  # [positions, width]


@dataclass(frozen=True, slots=True)
class Probe:
    """One intermediate value of the step.

    Attributes:
        name: of its tensor in a ground truth.
        op: name of the op that computes it.
        field: the op's view of it.
        width: values per position.
        layer: its index, or None outside of layers.
        in_table: True for a probe of the table, False for a stage.
    """

    name: str
    op: str
    field: str
    width: int
    layer: int | None
    in_table: bool


_IN_TABLE = {"embedding", "output", "final_norm", "logits"}
_IN_TABLE_OF_LAYER_0 = {"input_norm", "q", "k", "v", "attention", "mlp"}


def all_probes(geometry: ModelGeometry) -> list[Probe]:
    """Probes and stages, in execution order."""
    probes = []
    for each in activations(geometry):
        if each.kind == "mlp" and each.layer != 0:
            continue
        in_table = each.kind in _IN_TABLE or (each.layer == 0 and each.kind in _IN_TABLE_OF_LAYER_0)
        probes.append(Probe(each.name, each.op, each.field, each.width, each.layer, in_table))
    return probes


class Prober:
    """An observer that passes every probe's rows to `sink`, and may replace the inputs of layers or of ops.

    Args:
        probes: to read.
        sink: called with the probe, the position of its first row, and its rows [n, width] as float32.
        check_position: called after each step with the expected and the actual position.
        feed: called with the name of a probe, a position and a number of rows; its result replaces an input.
        isolation: whose inputs are replaced, if `feed` is given.
        others: observers that are called after `feed` and before the probes are read.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        sink: Callable[[Probe, int, Rows], None],
        check_position: Callable[[int, int], None] | None = None,
        feed: Callable[[str, int, int], Rows] | None = None,
        others: Sequence[Observer] = (),
        isolation: Isolation = "layers",
    ) -> None:
        self._probes_by_op: dict[str, list[Probe]] = {}
        for probe in probes:
            self._probes_by_op.setdefault(probe.op, []).append(probe)
        self._sink, self._check_position, self._feed, self._others = sink, check_position, feed, others
        self._isolation = isolation
        self._layers = 1 + max((probe.layer for probe in probes if probe.layer is not None), default=-1)
        self._position = 0  # of the step's first token, counted on the host
        self._residual: View | None = None  # of the step
        self._before: NDArray[Any] | None = None  # the residual before `down`, for the probe "mlp"

    def begin(self, position: int) -> None:
        """Set the position of the next step's first token."""
        self._position = position

    def before(self, op: Op, memory: Memory) -> None:
        """Replace inputs; replace non-finite logits before sampling."""
        if isinstance(op, Embed):
            self._residual = op.residual
        if self._feed is not None:
            for view, name in fed_views(op, self._layers, self._isolation):
                first, view = self._rows(op, view)
                memory.write(view, self._feed(name, first, view.shape[0]))
        if isinstance(op, Sample) and not np.isfinite(memory.read(op.logits)).all():
            # They are already compared. A sampler would reject them, and its token is not used.
            memory.write(op.logits, np.zeros(op.logits.shape, np.float32))
        for other in self._others:
            other.before(op, memory)
        if any(probe.name.endswith(".mlp") for probe in self._probes_by_op.get(op.name, ())):
            self._before = memory.read(op.writes[0])

    def after(self, op: Op, memory: Memory) -> None:
        """Read the op's probes."""
        for other in self._others:
            other.after(op, memory)
        for probe in self._probes_by_op.get(op.name, ()):
            view: View = getattr(op, probe.field)
            first = self._position
            if probe.field in {"keys", "values"}:  # all rows of the cache: a stray write may have changed earlier ones
                view, first = view.rows(0, first + op.writes[0].shape[0]), 0
            elif isinstance(op, LmHead):
                first = self._first_position(op.residual)
            rows = memory.read(view).astype(np.float32)
            if probe.name.endswith(".mlp") and self._before is not None:
                rows -= self._before
            self._sink(probe, first, rows)
        if isinstance(op, Advance) and self._check_position is not None:
            self._check_position(self._position + op.tokens, int(memory.read(op.position)[0]))

    def _rows(self, op: Op, view: View) -> tuple[int, View]:
        """The position of the first of a step's rows of a view that an op reads, and the view of these rows."""
        if isinstance(op, LmHead):
            return self._first_position(op.residual), view
        if isinstance(op, Attention) and view is not op.q:
            return self._position, view.rows(self._position, self._position + op.q.shape[0])
        return self._position, view

    def _first_position(self, rows: View) -> int:
        """The position of the first of these rows of the residual stream; the head may take only the last row."""
        if self._residual is None:
            raise RuntimeError("a step must start with its embedding")
        return self._position + (rows.address - self._residual.address) // self._residual.strides[0]
