"""A fault on purpose, to see a validation find it."""

from collections.abc import Sequence

import numpy as np

from numba_atomflow.backends.base import Memory
from numba_atomflow.errors import OptionError
from numba_atomflow.model.step import Op


class SignFlip:
    """An observer that turns the sign of what one op writes last: a relative error of 2, which no tolerance allows."""

    def __init__(self, op: str) -> None:
        self.op = op

    def before(self, op: Op, memory: Memory) -> None:
        """Nothing yet."""

    def after(self, op: Op, memory: Memory) -> None:
        """Spoil the output."""
        if op.name == self.op:
            view = op.writes[-1]
            memory.write(view, -memory.read(view))


def inject(op: str, ops: Sequence[Op]) -> SignFlip:
    """The observer for `op`.

    Raises:
        OptionError: no op of the step has this name, or it writes no activations.
    """
    spoilable = [o.name for o in ops if o.writes and np.dtype(o.writes[-1].dtype).kind == "f"]
    if op not in spoilable:
        raise OptionError(f"--inject {op} names no op that can be spoilt; for example {spoilable[1]} can.")
    return SignFlip(op)
