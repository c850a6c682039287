"""Arg-max over the logits, after the repetition penalty: greedy decoding, and where sampling starts from.

Cost model: 4 * V bytes read by the whole chip, 3-4 us.
"""

from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I64, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, PENALTY, penalised, sort_key, warp_max_key

THREADS = 256
_CTAS_PER_SM = 2


class ArgmaxArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        logits: [V].
        seen: bitmap [ceil(V / 32)] of the tokens in the context.
        options: [5], see `order`: the penalty is read.
        best: [1], `LOWEST_KEY` before; the largest key after.
    """

    logits: F32
    seen: U32
    options: F64
    best: I64


def make_argmax(vocabulary: int, *, row_ctas: int = 0, dependent: bool = False) -> Any:
    """Kernel (`ArgmaxArguments`): best[0] = max(best[0], key of every token).

    Launch: any number of CTAs of `THREADS` threads, no shared memory; `row_ctas` for each row, if that is not 0.

    Args:
        row_ctas: 0, or the CTAs of a row: then there are several rows of logits, each with its `seen` and `best`.
    """
    words = -(-vocabulary // 32)

    @ptx.device_function
    def of_row(io, row):
        """The arguments of one row."""
        return ArgmaxArguments(
            io.logits[row * vocabulary : (row + 1) * vocabulary],
            io.seen[row * words : (row + 1) * words],
            io.options,
            io.best[row : row + 1],
        )

    @ptx.kernel(THREADS, 4)
    def argmax(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        thread = cuda.threadIdx.x
        penalty = f32(io.options[PENALTY])
        largest = int64(LOWEST_KEY)
        block, blocks = cuda.blockIdx.x, cuda.gridDim.x
        if row_ctas:
            io = of_row(io, int64(block // row_ctas))
            block, blocks = block % row_ctas, row_ctas
        token = block * THREADS + thread
        while token < vocabulary:
            largest = max(largest, sort_key(penalised(io.logits, io.seen, token, penalty), token))
            token += blocks * THREADS
        largest = warp_max_key(largest)
        if thread & 31 == 0:
            cuda.atomic.max(io.best, 0, largest)

    return argmax


def argmax_kernel(vocabulary: int, sms: int, dependent: bool) -> Planned:
    """The spec of the kernel of `make_argmax`."""
    options = {"vocabulary": vocabulary, "dependent": dependent}
    spec = kernel_spec("argmax", make_argmax, ArgmaxArguments, THREADS, **options)
    return Planned(spec, min(-(-vocabulary // THREADS), _CTAS_PER_SM * sms))


def argmax_rows_kernel(vocabulary: int, sms: int, dependent: bool) -> Planned:
    """The same for several rows, and its CTAs for each."""
    ctas = argmax_kernel(vocabulary, sms, dependent).ctas
    options = {"vocabulary": vocabulary, "dependent": dependent, "row_ctas": ctas}
    return Planned(kernel_spec("argmax_rows", make_argmax, ArgmaxArguments, THREADS, **options), ctas)
