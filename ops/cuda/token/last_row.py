"""The residual of a chunk's last token by itself: the LM head of a prompt reads no other.

Cost model: a launch (2-3 us).
"""

from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, Planned, kernel_spec

THREADS = 256


class LastRowArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        residual: [tokens, hidden].
        count: [1], tokens of the chunk.
        row: [hidden].
    """

    residual: F32
    count: I64
    row: F32


def make_last_row(hidden: int, *, dependent: bool = False) -> Any:
    """Kernel (`LastRowArguments`): row = residual[count - 1]. Launch: `last_row_ctas(hidden)` CTAs of `THREADS`."""

    @ptx.kernel(THREADS, 1)
    def last_row(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < hidden:
            io.row[i] = io.residual[(io.count[0] - 1) * hidden + i]

    return last_row


def last_row_ctas(hidden: int) -> int:
    """CTAs of a launch."""
    return -(-hidden // THREADS)


def last_row_kernel(hidden: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_last_row`."""
    spec = kernel_spec("last_row", make_last_row, LastRowArguments, THREADS, hidden=hidden, dependent=dependent)
    return Planned(spec, last_row_ctas(hidden))
