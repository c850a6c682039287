"""Fault injection, to test that a validation detects a fault."""

from collections.abc import Sequence

import numpy as np

from numba_atomflow.backends.base import Memory
from numba_atomflow.errors import OptionError
from numba_atomflow.model.step import Op


class SignFlip:
    """An observer that negates the last output of one op: a relative error of 2, above every tolerance."""

    def __init__(self, op: str) -> None:
        self.op = op

    def before(self, op: Op, memory: Memory) -> None:
        """No effect."""

    def after(self, op: Op, memory: Memory) -> None:
        """Negate the output."""
        if op.name == self.op:
            view = op.writes[-1]
            memory.write(view, -memory.read(view))


def inject(op: str, ops: Sequence[Op]) -> SignFlip:
    """The observer for `op`.

    Raises:
        OptionError: no op of the step has this name, or it writes no activations.
    """
    candidates = [o.name for o in ops if o.writes and np.dtype(o.writes[-1].dtype).kind == "f"]
    if op not in candidates:
        raise OptionError(f"--inject {op} names no op with an output to negate; {candidates[1]} is one that has.")
    return SignFlip(op)
