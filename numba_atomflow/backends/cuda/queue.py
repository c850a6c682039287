"""Tokens between host and device: pinned memory in both directions, and nobody waits for more than he must.

To the device: a prompt's blocks are copied from a ring of pinned memory in stream order. To the host: the step's last
kernel stores each sampled token with its number into a ring of pinned memory, where the host sees it as soon as it is
there.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from numba_atomflow.backends.cuda.kernels import RING
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.errors import non_finite_logits
from numba_atomflow.memory.device import PinnedArray, copy_to_device
from numba_atomflow.memory.view import View

_STAGED = 1 << 14  # tokens of prompts that may be on their way to the device
_POLLS = 2000  # looks at the ring (some 100 us) between looks at the stream
_ID_BITS = 31


class TokenChannel:
    """Both directions for one stream. `made` owns the memory."""

    def __init__(self, stream: Any, made: Resources) -> None:
        self._stream = stream
        self._to_device = PinnedArray((_STAGED,), "int32", made)
        self._to_host = PinnedArray((RING,), "uint64", made)
        self._staged = 0

    @property
    def ring(self) -> View:
        """Where the device stores sampled tokens."""
        return self._to_host.view

    def send(self, tokens: Sequence[int], target: View) -> None:
        """Put a block's tokens into `target`, in stream order."""
        if self._staged + len(tokens) > _STAGED:
            call("cuStreamSynchronize", self._stream)  # then all that was staged has been copied
            self._staged = 0
        staged = self._to_device.array[self._staged : self._staged + len(tokens)]
        staged[:] = tokens
        self._staged += len(tokens)
        copy_to_device(target.address, staged, self._stream)

    def receive(self, number: int, check: Callable[[], None]) -> int:
        """The token with this number (from 1 on), as soon as the device has made it.

        Args:
            check: called now and then while nothing comes; raises if the stream has failed, or waits until it has
                ended, if it has nothing to do any more.

        Raises:
            CheckpointError: its logits contain NaN or Inf.
        """
        slot, wanted = self._to_host.array[(number - 1) % RING : (number - 1) % RING + 1], number & 0xFFFFFFFF
        polls = 0
        while True:
            entry = int(slot[0])
            if entry >> 32 == wanted:
                break
            polls += 1
            if polls % _POLLS == 0:
                check()
                time.sleep(0)  # let other threads run
        if entry >> _ID_BITS & 1:
            raise non_finite_logits()
        return entry & ((1 << _ID_BITS) - 1)
