"""Sampling from each row of logits of a step of several tokens, on the device.

The kernels are those that follow a decode step, launched once for each row. Row c is sampled as in the decode step that
would come after c accepted tokens: with the random number of that draw and, under a repetition penalty, with the
proposed tokens up to it among those seen. Its token is that of plain decoding, then, if all proposed tokens up to it
were accepted; what comes after a rejected one is posted, and not read.

Cost model: for each row what sampling adds to a decode step, 20 to 40 us at 128,256 tokens; no logits leave the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.kernels import TOKEN_RING
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.advance import AdvanceArguments
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.sample import SampleArguments
from numba_atomflow.sampling import Sampler

_STEPS = 1 << 22  # after which the numbers of tokens begin again


class _RowState(NamedTuple):
    """What sampling from a row reads and writes, beside the logits.

    Attributes:
        posted: [1] int64; number of the token that was posted last. generator: [2] uint64; seed, number of the draw.
        best: [1] int64. token: [1] int32. seen: [ceil(V / 32)] uint32. ring: [1] uint64, pinned.
    """

    posted: View
    generator: View
    best: View
    token: View
    seen: View
    ring: View


class WideSampling:
    """Samples the tokens of steps of up to `width` tokens.

    Args:
        loaded: kernels by name. width: most tokens of a step. resources: owns the pinned memory.
    """

    def __init__(self, model: DeviceModel, loaded: LoadedKernels, width: int, resources: Resources) -> None:
        self._model, self._loaded = model, loaded
        self._ring = PinnedArray((width,), "uint64", resources)
        self._rows = [self._state(row) for row in range(width)]
        self._launches: list[list[Launch]] = []  # by row
        self._step = 0  # number of the last one

    def _state(self, row: int) -> _RowState:
        buffers = self._model.buffers
        state = buffers["verify.sampling"].rows(row, row + 1)
        return _RowState(
            posted=View("verify.posted", state.address, (1,), "int64"),
            generator=View("verify.generator", state.address + 8, (2,), "uint64"),
            best=buffers["verify.best"].rows(row, row + 1),
            token=buffers["verify.sampled"].rows(row, row + 1),
            seen=buffers["verify.seen_rows"].index(row),
            ring=self._ring.view.rows(row, row + 1),
        )

    def send(self, tokens: Sequence[int], sampler: Sampler) -> None:
        """Copy what sampling in a step of these tokens depends on to the device, in stream order."""
        self._step = (self._step + 1) % _STEPS
        if self._step == 0:  # a row that was not used for so long would hold a token of the same number
            call("cuStreamSynchronize", self._model.stream)
            self._ring.array[:] = 0
        rows, staged, buffers = range(len(tokens)), self._model.staged, self._model.buffers
        # A number of 1 modulo the ring's size puts each row's token into its own entry.
        states = [[self._step * TOKEN_RING, sampler.seed, sampler.draws + row] for row in rows]
        staged.write(buffers["verify.sampling"], np.array(states, np.uint64).reshape(-1))
        if sampler.params.repetition_penalty != 1.0:
            for state, bitmap in zip(self._rows, _seen_rows(sampler, tokens), strict=False):
                staged.write(state.seen, bitmap)

    def run(self, rows: int) -> None:
        """Launch the sampling of so many rows."""
        while len(self._launches) < rows:
            self._launches.append(self._bind(len(self._launches)))
        for launches in self._launches[:rows]:
            for launch in launches:
                launch.run()

    def posted(self, row: int) -> int | None:
        """What the device has posted for a row, as `posted_token` reads it; None: nothing yet."""
        entry = int(self._ring.array[row])
        return entry if entry >> 32 == (self._step * TOKEN_RING + 1) & 0xFFFFFFFF else None

    def _bind(self, row: int) -> list[Launch]:
        model, state, options = self._model, self._rows[row], self._model.sampling.options
        logits, position = model.wide_logits(row, row + 1), model.buffers["verify.step"]
        common = {"logits": logits, "seen": state.seen, "options": options, "best": state.best}
        posted = AdvanceArguments(
            token=state.token,
            best=state.best,
            position=View("verify.position", position.address, (1,), "int64"),
            seen=state.seen,
            token_ring=state.ring,
            tokens_posted=state.posted,
            tokens=0,
        )
        named = {
            "argmax": ArgmaxArguments(**common),
            "sample": SampleArguments(**common, generator=state.generator, token=state.token),
            "advance_sampled": posted,
        }
        planned = model.kernels.planned
        return [Launch(self._loaded[name], planned[name].ctas, of, model.stream) for name, of in named.items()]


def _seen_rows(sampler: Sampler, tokens: Sequence[int]) -> NDArray[np.uint32]:
    """Bitmaps [len(tokens), ceil(V / 32)] of the tokens in the context of each row."""
    packed = np.packbits(sampler.seen, bitorder="little")
    rows = np.zeros((len(tokens), -(-len(sampler.seen) // 32)), np.uint32)
    rows.view(np.uint8)[:, : len(packed)] = packed
    for row, token in enumerate(tokens):
        rows[row:, token // 32] |= np.uint32(1 << token % 32)
    return rows
