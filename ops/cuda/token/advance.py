"""The end of a decode step: the token is posted to the host, and the position advances."""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import I32, I64, NUMBER, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import u32
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NON_FINITE_KEY

_THREADS = 32  # that it is compiled for; it is launched with one


class AdvanceArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        token: [1], from sampling.
        best: [1], the arg-max's key.
        position: [1].
        seen, token_ring, tokens_posted: as in `post_token`.
        tokens: how far the position moves.
    """

    token: I32
    best: I64
    position: I64
    seen: U32
    token_ring: U64
    tokens_posted: I64
    tokens: NUMBER


@ptx.device_function
def post_token(token, best, seen, token_ring, size, tokens_posted):
    """Mark a chosen token as seen and post it to the host.

    Args:
        token: its id. best: its arg-max's key.
        seen: uint32 bitmap [ceil(V / 32)].
        token_ring: uint64 [size] in pinned host memory. An entry is one store of 8 bytes, so that the host reads all of
            it or nothing: the token's number, from 1 on, above its id, with bit 31 set if its logit is +Inf or NaN.
        tokens_posted: int64 [1].
    """
    number = tokens_posted[0] + 1
    tokens_posted[0] = number
    seen[token // 32] = u32(int64(seen[token // 32]) | int64(1) << (token % 32))
    non_finite = int64(1) if best >= NON_FINITE_KEY else int64(0)
    word = (number & 0xFFFFFFFF) << 32 | non_finite << 31 | token
    token_ring[(number - 1) % size] = np.uint64(word)
    cuda.threadfence_system()


def make_advance(ring: int, *, sampled: bool, row_words: int = 0, dependent: bool = False) -> Any:
    """Kernel (`AdvanceArguments`): the step's last one. The position moves; if the step chose a token, the token is
    posted and `best` is reset for the next arg-max.

    Launch: one CTA of one thread; one for each row, if `row_words` is not 0.

    Args:
        ring: entries of the token ring.
        row_words: 0, or ceil(V / 32): then there are several rows, each with arguments of its own, but for the
            position; a row's `token_ring` begins one entry after that of the row before.
    """

    @ptx.device_function
    def of_row(io, row):
        """The arguments of one row."""
        return AdvanceArguments(
            io.token[row : row + 1],
            io.best[row : row + 1],
            io.position,
            io.seen[row * row_words : (row + 1) * row_words],
            io.token_ring[row:],
            io.tokens_posted[row : row + 1],
            io.tokens,
        )

    @ptx.kernel(_THREADS, 1)
    def advance(io):
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        if row_words:
            io = of_row(io, int64(cuda.blockIdx.x))
        io.position[0] += io.tokens
        if sampled:
            post_token(int64(io.token[0]), io.best[0], io.seen, io.token_ring, ring, io.tokens_posted)
            io.best[0] = LOWEST_KEY

    return advance


def advance_kernel(ring: int, *, sampled: bool, dependent: bool) -> Planned:
    """The spec of the kernel of `make_advance`."""
    name, options = "advance_sampled" if sampled else "advance", {"ring": ring, "sampled": sampled}
    return Planned(kernel_spec(name, make_advance, AdvanceArguments, 1, dependent=dependent, **options), 1)


def post_rows_kernel(ring: int, vocabulary: int, dependent: bool) -> Planned:
    """That of several rows, with a CTA for each."""
    options = {"ring": ring, "sampled": True, "row_words": -(-vocabulary // 32), "dependent": dependent}
    return Planned(kernel_spec("post_rows", make_advance, AdvanceArguments, 1, **options), 1)
