"""Sampling from each row of logits of a step of several tokens, on the device.

The kernels are those that follow a decode step, for several rows in one launch. Row c is sampled as in the decode step
that would come after c accepted tokens: with the random number of that draw and, under a repetition penalty, with the
proposed tokens up to it among those seen. Its token is that of plain decoding, then, if all proposed tokens up to it
were accepted; what comes after a rejected one is posted, and not read.

Cost, 128,256 tokens, H200, 1 to 8 rows: 30 to 170 us more than a step whose tokens the kernel chooses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.kernels import TOKEN_RING
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import PinnedArray, StagedWrites
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.advance import AdvanceArguments
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.sample import SampleArguments
from numba_atomflow.sampling import Sampler

KERNELS = ("argmax_rows", "sample_rows", "post_rows")
_STEPS = 1 << 22  # after which the numbers of tokens begin again


class WideSampling:
    """Samples the tokens of steps that verify.

    Args:
        buffers: all views but the weights, by name. staged: writes to them, in the order of `stream`.
        loaded: kernels by name, of which `planned` are these. resources: owns the pinned memory.
    """

    def __init__(
        self,
        buffers: Mapping[str, View],
        staged: StagedWrites,
        stream: Any,
        loaded: LoadedKernels,
        planned: Mapping[str, Planned],
        resources: Resources,
    ) -> None:
        self._buffers, self._staged, self._stream = buffers, staged, stream
        self._loaded, self._planned = loaded, planned
        self._ring = PinnedArray(buffers["verify.sampled"].shape, "uint64", resources)
        self._launches: dict[int, list[Launch]] = {}  # by the number of rows
        self._step = 0  # number of the last one

    def send(self, tokens: Sequence[int], sampler: Sampler) -> None:
        """Copy what sampling in a step of these tokens depends on to the device, in stream order."""
        self._step = (self._step + 1) % _STEPS
        if self._step == 0:  # a row that was not used for so long would hold a token of the same number
            call("cuStreamSynchronize", self._stream)
            self._ring.array[:] = 0
        rows, staged, buffers = range(len(tokens)), self._staged, self._buffers
        # The number after a multiple of the ring's size puts a row's token into the first entry of its own ring.
        staged.write(buffers["verify.tokens_posted"], [self._step * TOKEN_RING] * len(tokens))
        generators = np.array([(sampler.seed, sampler.draws + row) for row in rows], np.uint64)
        staged.write(buffers["verify.generators"], generators.reshape(-1))
        if sampler.params.repetition_penalty != 1.0:
            for row, bitmap in enumerate(_seen_rows(sampler, tokens)):
                staged.write(buffers["verify.seen_rows"].index(row), bitmap)

    def run(self, rows: int) -> None:
        """Launch the sampling of so many rows."""
        if rows not in self._launches:
            self._launches[rows] = self._bind(rows)
        for launch in self._launches[rows]:
            launch.run()

    def posted(self, row: int) -> int | None:
        """What the device has posted for a row, as `posted_token` reads it; None: nothing yet."""
        entry = int(self._ring.array[row])
        return entry if entry >> 32 == (self._step * TOKEN_RING + 1) & 0xFFFFFFFF else None

    def _bind(self, rows: int) -> list[Launch]:
        buffers, planned, logits = self._buffers, self._planned, self._buffers["verify.logits"].rows(0, rows)
        seen, best, token = (buffers[f"verify.{name}"] for name in ("seen_rows", "best", "sampled"))
        common = {"logits": logits, "seen": seen, "options": buffers["sampling.options"], "best": best}
        post = AdvanceArguments(
            token=token,
            best=best,
            position=View("verify.position", buffers["verify.step"].address, (1,), "int64"),
            seen=seen,
            token_ring=self._ring.view,
            tokens_posted=buffers["verify.tokens_posted"],
            tokens=0,
        )
        generator, sums = buffers["verify.generators"], buffers["verify.sums"]
        sample = SampleArguments(**common, generator=generator, sums=sums, token=token)
        named = zip(KERNELS, (ArgmaxArguments(**common), sample, post), strict=True)
        return [
            Launch(self._loaded[name], rows * planned[name].ctas, arguments, self._stream) for name, arguments in named
        ]


def _seen_rows(sampler: Sampler, tokens: Sequence[int]) -> NDArray[np.uint32]:
    """Bitmaps [len(tokens), ceil(V / 32)] of the tokens in the context of each row."""
    packed = np.packbits(sampler.seen, bitorder="little")
    rows = np.zeros((len(tokens), -(-len(sampler.seen) // 32)), np.uint32)
    rows.view(np.uint8)[:, : len(packed)] = packed
    for row, token in enumerate(tokens):
        rows[row:, token // 32] |= np.uint32(1 << token % 32)
    return rows
